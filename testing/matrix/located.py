"""YAML with line numbers: every mapping and list remembers where it stands, so that an error can name the line."""

from pathlib import Path
from typing import Any

import yaml


class MatrixError(ValueError):
    """A file that cannot be used; the message is one sentence and names the file, the line and the cell."""


class LocatedDict(dict):
    """A mapping that knows its own line and the line of each key (counted from 1)."""

    line: int
    lines: dict[str, int]


class LocatedList(list):
    """A list that knows its own line and the line of each item (counted from 1)."""

    line: int
    lines: list[int]


def load(path: Path) -> Any:
    """Parse a YAML file into plain values, LocatedDict and LocatedList.

    Raises:
        MatrixError: the file cannot be read, is not YAML, or a mapping has the same key twice or one that is no word.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MatrixError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise MatrixError(f"{path}:{line}: is not YAML: {error.problem}") from None
    if root is None:
        raise MatrixError(f"{path}: is empty")
    return _build(root, path, yaml.SafeLoader(""))


def _build(node: yaml.Node, path: Path, constructor: yaml.SafeLoader) -> Any:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        mapping = LocatedDict()
        mapping.line, mapping.lines = line, {}
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            key = constructor.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise MatrixError(f"{path}:{key_line}: a key must be a word")
            if key in mapping:
                raise MatrixError(f"{path}:{key_line}: the key {key!r} was already given on line {mapping.lines[key]}")
            mapping.lines[key] = key_line
            mapping[key] = _build(value_node, path, constructor)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        items = LocatedList(_build(item, path, constructor) for item in node.value)
        items.line, items.lines = line, [item.start_mark.line + 1 for item in node.value]
        return items
    return constructor.construct_object(node)
