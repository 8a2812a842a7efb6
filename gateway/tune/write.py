"""One field of one model into a policy's text, with everything else left as it stands."""

import yaml


class CannotWrite(ValueError):
    """The model is not where a field could be written."""


def with_field(text: str, model: str, field: str, value: object | None, comment: str = "") -> str:
    """`text` with `value` as that field of the model, in place of the one it has; None: without one.

    Raises CannotWrite where the policy does not have the model as a mapping of its own.
    """
    node = _model(text, model)
    found = next(((key, value) for key, value in node.value if key.value == field), None)
    if found is not None:
        text = _without(text, node, *found)
        node = _model(text, model)
    if value is None:
        return text
    if node.flow_style:
        at = node.end_mark.index - 1
        before = text[:at].rstrip()
        comma = "" if before.endswith(("{", ",")) else ", "
        return f"{before}{comma}{field}: {flow(value)}{text[at:]}"
    key, last = node.value[-1]
    at = _line_end(text, last.end_mark.index)
    note = f"  # {comment}" if comment else ""
    line = f"{' ' * key.start_mark.column}{field}: {flow(value)}{note}"
    return f"{text[:at].rstrip()}\n{line}\n{text[at:].removeprefix(chr(10))}"


def flow(value: object) -> str:
    """As YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).strip()


def _model(text: str, model: str) -> yaml.MappingNode:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    models = _entry(root, "models") if isinstance(root, yaml.MappingNode) else None
    node = _entry(models, model) if isinstance(models, yaml.MappingNode) else None
    if not isinstance(node, yaml.MappingNode) or not node.value:
        raise CannotWrite(f"models.{model}: no such model with fields of its own in this policy")
    return node


def _entry(node: yaml.MappingNode, name: str) -> yaml.Node | None:
    return next((value for key, value in node.value if key.value == name), None)


def _without(text: str, node: yaml.MappingNode, key: yaml.Node, value: yaml.Node) -> str:
    start, end = key.start_mark.index, value.end_mark.index
    if not node.flow_style:
        return text[: text.rfind("\n", 0, start) + 1] + text[_line_end(text, end) :].removeprefix("\n")
    before, after = text[:start].rstrip(), text[end:]
    if after.lstrip().startswith(","):
        return (
            f"{before} {after.lstrip()[1:].lstrip()}" if before.endswith(",") else before + after.lstrip()[1:].lstrip()
        )
    return before.removesuffix(",") + after


def _line_end(text: str, index: int) -> int:
    """Where the line ends that holds the last character before `index`."""
    last = len(text[:index].rstrip())
    end = text.find("\n", last)
    return len(text) if end < 0 else end
