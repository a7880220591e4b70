"""Regexes from a file, which anybody may have written: matched in a bounded number of steps.

``re`` backtracks, so that ``(a+)+b`` takes 2^n steps for a name of n letters. Here an expression is applied to the set
of all places that the part before it can end at, so that no place is tried twice; and the steps are counted.
"""

import re
from collections.abc import Callable

STEPS = 10**8  # of one file: about half a minute

# From the places where a part of the expression begins in a text to those where it can end.
Part = Callable[[str, set[int]], set[int]]

_TOKEN = re.compile(
    r"(?P<open>\((?:\?(?:[:=!]|P<\w+>)|(?!\?)))"
    r"|(?P<close>\))"
    r"|(?P<bar>\|)"
    r"|(?P<repeat>(?:[*+?]|\{(?=[\d,])(?P<least>\d*)(?P<comma>,?)(?P<most>\d*)\})\??)"
    r"|(?P<atom>\\(?:\W|[dDwWsSbBAZtnrfv])|\[\^?\]?(?:\\.|[^\]\\])*\]|[^()\[\\])",
    re.DOTALL,
)


class Bounded:
    """Compiles regexes that share one number of steps.

    What a group has matched is not kept: back references, conditions, look-behind, inline flags, atomic groups and
    possessive repeats are refused.
    """

    def __init__(self, steps: int = STEPS) -> None:
        self._left = steps

    def compile(self, regex: str) -> "BoundedRegex":
        """An object whose ``fullmatch`` answers as that of ``re.compile(regex)``.

        Raises:
            re.error, OverflowError, RecursionError: as ``re.compile``; ``re.error`` also for what is refused.
        """
        re.compile(regex)
        return BoundedRegex(_Parser(regex, self._count).parse(), regex)

    def _count(self, steps: int, regex: str) -> None:
        self._left -= steps
        if self._left < 0:
            raise ValueError(f"a regex takes too many steps to match, write the names into a list instead: {regex!r}")


class BoundedRegex:
    def __init__(self, part: Part, regex: str) -> None:
        self._part = part
        self._regex = regex

    def fullmatch(self, text: str) -> bool:
        return len(text) in self._part(text, {0})


class _Parser:
    def __init__(self, regex: str, count: Callable[[int, str], None]) -> None:
        self._regex = regex
        self._count = count
        self._at = 0

    def parse(self) -> Part:
        part = self._alternatives()
        if self._at < len(self._regex):
            self._refuse()
        return part

    def _refuse(self) -> None:
        raise re.error("dorac takes only plain regexes from a file", self._regex, self._at)

    def _next(self) -> re.Match | None:
        if self._at == len(self._regex):
            return None
        token = _TOKEN.match(self._regex, self._at)
        if token is None:
            self._refuse()
        return token

    def _alternatives(self) -> Part:
        parts = [self._sequence()]
        while (token := self._next()) and token["bar"]:
            self._at = token.end()
            parts.append(self._sequence())
        if len(parts) == 1:
            return parts[0]
        return lambda text, places: set().union(*(part(text, places) for part in parts))

    def _sequence(self) -> Part:
        parts, run = [], ""  # letters up to the next group or repeat are one step
        while (token := self._next()) and not token["bar"] and not token["close"]:
            if token["repeat"]:  # of nothing, or of a repeat
                self._refuse()
            self._at = token.end()
            part = self._group(token["open"]) if token["open"] else None
            repeat = self._next()
            repeated = repeat is not None and repeat["repeat"]
            if part is None and not repeated:
                run += token["atom"]
                continue
            if run:
                parts.append(self._atom(run))
                run = ""
            part = part or self._atom(token["atom"])
            if repeated:
                self._at = repeat.end()
                part = _repeated(part, *_counts(repeat))
            parts.append(part)
        if run:
            parts.append(self._atom(run))

        def run_all(text: str, places: set[int]) -> set[int]:
            for part in parts:
                if not places:
                    break
                places = part(text, places)
            return places

        return parts[0] if len(parts) == 1 else run_all

    def _atom(self, text: str) -> Part:
        regex, count, whole = re.compile(text), self._count, self._regex

        def match(text: str, places: set[int]) -> set[int]:
            count(1 + len(places), whole)
            return {found.end() for place in places if (found := regex.match(text, place))}

        return match

    def _group(self, opening: str) -> Part:
        part = self._alternatives()
        self._at += 1  # the closing parenthesis, which re.compile has seen
        if opening in ("(?=", "(?!"):
            wanted = opening == "(?="
            return lambda text, places: {place for place in places if bool(part(text, {place})) == wanted}
        return part


def _counts(repeat: re.Match) -> tuple[int, int | None]:
    sign = repeat["repeat"][0]
    if sign != "{":
        return (1 if sign == "+" else 0), (1 if sign == "?" else None)
    least = int(repeat["least"] or 0)
    if not repeat["comma"]:
        return least, least
    return least, int(repeat["most"]) if repeat["most"] else None


def _repeated(part: Part, least: int, most: int | None) -> Part:
    def match(text: str, places: set[int]) -> set[int]:
        times = 0
        while times < least and places:
            before, places = places, part(text, places)
            times += 1
            if places == before:
                times = max(times, least)
        # One more repeat leads on only from where the last one came first.
        reached, fresh = set(places), places
        while fresh and (most is None or times < most):
            fresh = part(text, fresh) - reached
            reached |= fresh
            times += 1
        return reached

    return match
