"""langchain-tests' standard suite for chat models, with the gateway as the model. `make judges` runs it."""

import os
from typing import Any

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestGateway(ChatModelIntegrationTests):
    """Images, PDF, audio and Anthropic's content blocks are not claimed: the fake upstream has no eyes and no ears."""

    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "small",
            "base_url": os.environ["JUDGED_URL"],
            "api_key": os.environ["JUDGED_KEY"],
            "stream_usage": True,
            "max_retries": 0,
        }

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "large"
