"""A small policy, changed line by line in the tests of the loader."""

import pytest

from routers.errors import PolicyError, Problem
from routers.load import parse

BASE = """\
version: 1
providers:
  home:   {engine: embedded}
  openai: {base_url: https://api.openai.com/v1, api_key: env:OPENAI_API_KEY}
models:
  local:  {provider: home, model: bundled/base, context: 1024}
  weak:   {provider: openai, model: gpt-5-mini, price: {input: $0.25/Mtok, output: $2/Mtok}}
  strong: {provider: openai, model: gpt-5, price: {input: $1.25/Mtok, output: $10/Mtok}}
signals:
  difficulty: {probe: default, heads: {local: local, weak: weak, strong: strong}}
routes:
  - name: private
    when: {tag: private}
    use: [local]
  - name: auto
    when: {model: auto}
    candidates: [local, weak, strong]
    subject_to: {p_success: ">= 0.90"}
limits:
  - {key: "*", budget: $50/month, rate: 600/min}
"""


LOCAL = "local:  {provider: home, model: bundled/base, context: 1024}"
WEAK_PRICE = "{input: $0.25/Mtok, output: $2/Mtok}"
ENV = "env:OPENAI_API_KEY"
LIMIT = '{key: "*", budget: $50/month, rate: 600/min}'
URL = "https://api.openai.com/v1"
P90 = '{p_success: ">= 0.90"}'
HEADS = "heads: {local: local, weak: weak, strong: strong}"
PRIVATE = "when: {tag: private}"


def problems(text: str) -> tuple[Problem, ...]:
    with pytest.raises(PolicyError) as caught:
        parse(text, file="p.yaml")
    return caught.value.problems


def changed(old: str, new: str) -> str:
    assert old in BASE
    return BASE.replace(old, new, 1)
