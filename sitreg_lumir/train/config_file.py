"""A config's YAML, measured before it becomes settings: aliases that multiply, depth, numbers that no setting has."""

from pathlib import Path
from typing import Any

import yaml

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.bounded import read_bytes
from sitreg_lumir.io.json_file import plain_problem

_LARGEST, _MOST_VALUES, _DEEPEST = 1 << 20, 20_000, 30


def read_config(file: Path) -> dict[str, Any]:
    """The settings of a YAML file; none where it holds something else than settings by names.

    Raises:
        InputError: it is missing, unreadable, no YAML, or larger than a config can be, aliases counted out.
    """
    try:
        text = read_bytes(file, _LARGEST, "a config").decode("utf-8-sig")
        tree = yaml.compose(text, yaml.SafeLoader)
        if tree is not None:
            _measure(tree, 0, {})
        content = yaml.safe_load(text)
    except InputError as error:
        raise InputError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); name a config that can be") from None
    except RecursionError:
        raise InputError(f"{file}: is nested too deeply for a config") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError, LookupError) as error:
        raise InputError(f"{file}: not valid YAML ({' '.join(str(error).split())[:300]})") from None
    problem = plain_problem(content, finite=True)
    if problem:
        raise InputError(f"{file}: {problem}")
    return content if isinstance(content, dict) else {}


def _measure(node: yaml.Node, depth: int, known: dict[int, int]) -> int:
    """The number of values below a node, aliases counted out.

    Args:
        node: of the tree, which may hold nodes several times, and itself.
        depth: of the node.
        known: the numbers of nodes that were counted, by their ids; 0 for those that are being counted.
    """
    if id(node) in known:
        if known[id(node)] == 0:
            raise InputError("an alias stands within what it names")
        return known[id(node)]
    if depth > _DEEPEST:
        raise RecursionError
    known[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    count = 1 + sum(_measure(child, depth + 1, known) for child in children)
    if count > _MOST_VALUES:
        raise InputError(f"holds more than {_MOST_VALUES} values, aliases counted out; no config does")
    known[id(node)] = count
    return count
