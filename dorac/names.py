"""Names of modules against what a user or a file says of them: PEFT's rules for lists, regexes and patterns.

Every expression is read once, and what names its modules letter by letter is looked up: a model of N modules and M
names takes N + M steps.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

# Makes an object with a ``fullmatch`` of a regex: ``re.compile``, or :meth:`dorac.bounded.Bounded.compile`.
Compile = Callable[[str], "re.Pattern"]

_PLAIN = r"[^.^$*+?{}\[\]\\|()]"  # stands for itself in a regex
_LITERAL = re.compile(rf"(?:{_PLAIN}|\\\W|\|)*")  # names, as re.escape writes them, and "|" between them
# What torch.compile and activation checkpointing call the module that they wrap.
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module"}
_FIXED = re.compile(rf"(\^?)((?:{_PLAIN}|\\\W|\.)*)(\$?)")  # a name in which a dot may stand for any letter


def compile_regex(argument: str, regex: str, compile: Compile = re.compile, *, around: str = "{}"):
    """The regex, put into the one around it, compiled; a ``ValueError`` that names the argument where it is none."""
    try:
        return compile(around.replace("{}", regex))
    except (re.error, OverflowError) as error:
        raise ValueError(f"{argument} is not a valid regex: {shortened(regex)}: {error}") from None
    except RecursionError:
        raise ValueError(f"{argument} is not a valid regex: {shortened(regex)}: nested too deeply") from None


def shortened(value: object) -> str:
    """The value as Python writes it, cut where it would fill the screen."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def plain_name(name: str) -> str:
    """The name of a module or tensor where no block of the model is in torch's compiling or checkpointing wrapper."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def endings(name: str) -> Iterator[str]:
    """The name and what follows each of its dots."""
    yield name
    while name := name.partition(".")[2]:
        yield name


def parents(name: str) -> Iterator[str]:
    """The name and the names of the modules that it lies in, the root excepted."""
    while name:
        yield name
        name = name.rpartition(".")[0]


class ModuleNames(list):
    """A list of names, which a notebook shows in one line however many they are."""

    def __repr__(self) -> str:
        if len(self) <= 4:
            return super().__repr__()
        return f"[{self[0]!r}, {self[1]!r}, ..., {self[-1]!r}] ({len(self)} modules)"


class Names:
    """A regex for the whole name, or a collection of names and their dotted endings.

    Raises:
        TypeError: neither. ValueError: not a valid regex.
    """

    def __init__(self, argument: str, names: str | Sequence[str], compile: Compile = re.compile) -> None:
        self._whole: set[str] = set()
        self._ends: set[str] = set()
        self._regex = None
        if isinstance(names, str):
            if _LITERAL.fullmatch(names):
                self._whole = set(_alternatives(names))
            else:
                self._regex = compile_regex(argument, names, compile)
        elif isinstance(names, (Sequence, set, frozenset)) and all(isinstance(n, str) for n in names):
            self._ends = set(names)
        else:
            raise TypeError(f"{argument} must be a string or a list of strings, got {names!r}")
        self._unused = {names} if isinstance(names, str) else self._ends

    def match(self, name: str) -> bool:
        if self._ends:
            found = self._ends.intersection(endings(name))
            self._unused = self._unused - found
            return bool(found)
        found = name in self._whole if self._regex is None else self._regex.fullmatch(name)
        if found:
            self._unused = set()
        return bool(found)

    def unused(self) -> list[str]:
        """The names, or the regex, that matched nothing that :meth:`match` was asked for."""
        return sorted(self._unused)

    def is_listed(self, name: str) -> bool:
        """Whether a list holds the full name."""
        return name in self._ends


def _alternatives(regex: str) -> Iterator[str]:
    """The texts that a regex of letters, escaped letters and ``|`` stands for."""
    text = ""
    for token in re.findall(r"\\?.", regex, re.DOTALL):
        if token == "|":
            yield text
            text = ""
        else:
            text += token[-1]
    yield text


class Pattern:
    """Values by regexes for the ends of names (a leading ``^`` anchors one); of several that match the first counts.

    Raises:
        TypeError: not a mapping from strings. ValueError: a key that is not a valid regex.
    """

    def __init__(self, argument: str, pattern: Mapping[str, float] | None, compile: Compile = re.compile) -> None:
        if not isinstance(pattern or {}, Mapping):
            raise TypeError(f"{argument} must map names to numbers, got {pattern!r}")
        self._items = list((pattern or {}).items())
        self._used: set[int] = set()
        self._regexes: list[tuple[int, re.Pattern]] = []
        # By anchor and length, then by the places of the dots: the numbers of the keys for a text without these places.
        self._fixed: dict[tuple[bool, int], dict[tuple[int, ...], dict[str, list[int]]]] = {}
        for number, (key, _) in enumerate(self._items):
            if not isinstance(key, str):
                raise TypeError(f"{argument} must map names to numbers, got the key {key!r}")
            if fixed := _FIXED.fullmatch(key):
                anchor, text, _ = fixed.groups()
                letters = re.findall(r"\\?.", text, re.DOTALL)
                dots = tuple(place for place, letter in enumerate(letters) if letter == ".")
                tables = self._fixed.setdefault((bool(anchor), len(letters)), {})
                text = _without("".join(letter[-1] for letter in letters), dots)
                tables.setdefault(dots, {}).setdefault(text, []).append(number)
            else:
                regex = compile_regex(f"{argument} has a key that", key, compile, around=r"(.*\.)?({})")
                self._regexes.append((number, regex))

    def value(self, name: str, default: float) -> float:
        """The value for a module, or ``default`` if no key matches its name."""
        matching = self._fixed_matching(name)
        first = min(matching, default=len(self._items))
        for number, regex in self._regexes:  # past the first one that matches only to learn which keys are used
            if (number < first or number not in self._used) and regex.fullmatch(name):
                matching.append(number)
                first = min(first, number)
        self._used.update(matching)
        return default if first == len(self._items) else self._items[first][1]

    def values(self, name: str) -> set[float]:
        """The values of all keys that match a module's name, of which :meth:`value` is the first."""
        matching = self._fixed_matching(name)
        matching += [number for number, regex in self._regexes if regex.fullmatch(name)]
        return {self._items[number][1] for number in matching}

    def _fixed_matching(self, name: str) -> list[int]:
        """The numbers of the keys that are looked up and match."""
        matching = [number for text in endings(name) for number in self._looked_up(text, anchored=False)]
        return [*matching, *self._looked_up(name, anchored=True)]

    def _looked_up(self, text: str, *, anchored: bool) -> Iterator[int]:
        for dots, table in self._fixed.get((anchored, len(text)), {}).items():
            yield from table.get(_without(text, dots), ())

    def unused(self) -> list[str]:
        """The keys that matched no name that :meth:`value` was asked for."""
        return [key for number, (key, _) in enumerate(self._items) if number not in self._used]


def _without(text: str, places: tuple[int, ...]) -> str:
    pieces = zip((-1, *places), (*places, len(text)), strict=True)
    return "".join(text[start + 1 : end] for start, end in pieces)
