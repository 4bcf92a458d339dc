"""The one reader of YAML: duplicate keys are errors, errors say where, and aliases cannot multiply without end."""

from __future__ import annotations

from typing import Any

import yaml

LONGEST = 1 << 20  # characters of a file
MOST_VALUES = 100_000  # of a file, when all its aliases are written out
DEEPEST = 50


class NotYaml(ValueError):
    """The text does not follow YAML's syntax."""


class _Loader(yaml.SafeLoader):
    where = ""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name = (key.tag, key.value)
            if name in seen:
                raise ValueError(f"{self.where} has {key.value!r} twice (line {key.start_mark.line + 1})")
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, where: str) -> Any:
    """Plain values of a YAML text; None if it is empty.

    Args:
        text: of the file.
        where: names it in errors.

    Raises:
        NotYaml: says line, column and what is wrong there.
        ValueError: a key is there twice, or the text would become too large.
    """
    if len(text) > LONGEST:
        raise ValueError(f"{where} has {len(text)} characters, at most {LONGEST} are read")
    loader = None
    try:
        loader = _Loader(text)
        loader.where = where
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {}, 0, where)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise NotYaml(f"{where} is not valid YAML: {_place(error)}") from None
    except yaml.reader.ReaderError as error:
        raise NotYaml(f"{where} is not valid YAML: character {error.position + 1}: {error.reason}") from None
    except RecursionError:
        raise ValueError(f"{where}: values are nested more than {DEEPEST} deep") from None
    except (ValueError, OverflowError, TypeError) as error:
        # Of our own checks, or of something that looks like a date or number but is not.
        said = str(error)
        raise (
            error if said.startswith(where) else ValueError(f"{where}: a value is not valid: {said[:120]}")
        ) from None
    finally:
        if loader is not None:
            loader.dispose()


def _place(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    said = error.problem or error.context or "damaged"
    if "\\t" in said and "cannot start any token" in said:
        said = "a tab cannot indent; use spaces"
    return f"line {mark.line + 1}, column {mark.column + 1}: {said}" if mark else said


def _size(node: yaml.Node, known: dict[int, int], depth: int, where: str) -> int:
    """Number of values below a node with aliases written out. Raises ValueError if there are too many, or a circle."""
    if depth > DEEPEST:
        raise ValueError(f"{where}: values are nested more than {DEEPEST} deep")
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError(f"{where}: an alias refers to a value that contains it (line {node.start_mark.line + 1})")
        return known[id(node)]
    known[id(node)] = 0
    total = 1
    if not isinstance(node, yaml.ScalarNode):
        parts = [p for pair in node.value for p in pair] if isinstance(node, yaml.MappingNode) else node.value
        for part in parts:
            total += _size(part, known, depth + 1, where)
            if total > MOST_VALUES:
                raise ValueError(f"{where}: its aliases expand to more than {MOST_VALUES} values")
    known[id(node)] = total
    return total
