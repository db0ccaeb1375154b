"""Operations on decision diagrams for packets that change on their way: what runs later sees another packet.

The terminals of a diagram are verdicts, and other negative numbers where a caller gives them a meaning of his own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from fwcompiler.proof.diagram import NO_CHAIN, STEPS, Builder, Diagrams, Rules, StepsExceeded

MAY = -9
"""Terminal: packets in here do not all end the same, and nobody knows which of them it is."""


class EndsBuilder(Builder):
    """Builds diagrams whose rules may end in any negative number."""

    def __init__(self, diagrams: Diagrams, rules: Rules) -> None:
        super().__init__(diagrams, rules)
        for verdict in {item.verdict for item in self.items} | {rules.policy}:
            same = sum(1 << i for i, item in enumerate(self.items) if item.chain == NO_CHAIN and item.verdict == verdict)
            self.ending.setdefault(verdict, same)


def relabel(diagrams: Diagrams, node: int, terminals: Mapping[int, int]) -> int:
    """The diagram with other terminals."""
    memo: dict[int, int] = {}

    def visit(node: int) -> int:
        if node < 0:
            return terminals.get(node, node)
        if node not in memo:
            level, edges = diagrams.nodes[node]
            memo[node] = _node(diagrams, level, ((mask, visit(child)) for mask, child in edges))
        return memo[node]

    return visit(node)


def graft(diagrams: Diagrams, node: int, terminal: int, other: int) -> int:
    """The diagram that goes on with another one wherever the first ends in `terminal`."""

    def end(first: int, second: int) -> int | None:
        if first < 0:
            return second if first == terminal else first
        return None

    return _both(diagrams, node, other, end)


def graft_all(diagrams: Diagrams, root: int, others: Mapping[int, int]) -> int:
    """The diagram that goes on with another one for each of several terminals, all at once.

    One graft after the other would walk all that was grafted before, again and again; here a part of the diagram meets only those
    that go on from it.
    """
    leads_to: dict[int, tuple[int, ...]] = {}
    memo: dict[tuple[int, tuple[int, ...]], int] = {}

    def ends(node: int) -> tuple[int, ...]:
        """The terminals below a node that have something grafted on."""
        if node < 0:
            return (node,) if node in others else ()
        if node not in leads_to:
            leads_to[node] = tuple(sorted({end for _, child in diagrams.nodes[node][1] for end in ends(child)}))
        return leads_to[node]

    def visit(node: int, rests: Mapping[int, int]) -> int:
        """`rests`: what is left of the diagrams to go on with, by terminal of this node."""
        if node < 0 or not rests:
            return rests.get(node, node)
        key = (node, tuple(rests.values()))
        if key not in memo:
            level = min(diagrams.level(node), *map(diagrams.level, rests.values()))
            diagrams.step(1)
            parts = (
                (mask, visit(child, left))
                for own, child in diagrams.edges(node, level)
                for mask, left in _split(diagrams, level, own, {end: rests[end] for end in ends(child)})
            )
            memo[key] = _node(diagrams, level, parts)
        return memo[key]

    return visit(root, {end: others[end] for end in ends(root)})


def _split(diagrams: Diagrams, level: int, mask: int, rests: Mapping[int, int]) -> Iterable[tuple[int, dict[int, int]]]:
    """The classes of a mask by where each of several diagrams leads from them."""
    parts: list[tuple[int, dict[int, int]]] = [(mask, {})]
    for end, rest in rests.items():
        if diagrams.level(rest) != level:
            for _, led in parts:
                led[end] = rest
            continue
        edges = diagrams.nodes[rest][1]
        parts = [(m & own, {**led, end: child}) for m, led in parts for own, child in edges if m & own]
    return parts


def merge(diagrams: Diagrams, first: int, second: int) -> int:
    """Either of two diagrams: where both agree, that; elsewhere `MAY`."""

    def end(first: int, second: int) -> int | None:
        if first == second:
            return first
        return MAY if first < 0 and second < 0 else None

    return _both(diagrams, first, second, end)


def assign(diagrams: Diagrams, node: int, field: int, mask: int) -> int:
    """What happens to a packet after a field got a new value, one of `mask`; `MAY` where that depends on which."""
    wanted = diagrams.levels[field]
    memo: dict[int, int] = {}

    def visit(node: int) -> int:
        if diagrams.level(node) > wanted:
            return node
        if node not in memo:
            level, edges = diagrams.nodes[node]
            if level == wanted:
                first, *others = (child for own, child in edges if own & mask)
                for child in others:
                    first = merge(diagrams, first, child)
                memo[node] = first
            else:
                memo[node] = _node(diagrams, level, ((own, visit(child)) for own, child in edges))
        return memo[node]

    return visit(node)


def choice(diagrams: Diagrams, field: int, mask: int, inside: int, outside: int) -> int:
    """One diagram where a field lies in `mask`, another elsewhere; both may decide any field."""
    level = diagrams.levels[field]
    here, there = -1001, -1002
    root = diagrams.node(level, {here: mask, there: diagrams.full[level] & ~mask})
    return graft(diagrams, graft(diagrams, root, here, inside), there, outside)


def reachable(diagrams: Diagrams, root: int) -> tuple[frozenset[int], frozenset[int]]:
    """Terminals, and fields that a diagram decides."""
    terminals: set[int] = set()
    fields: set[int] = set()
    seen: set[int] = set()
    queue = [root]
    while queue:
        node = queue.pop()
        if node < 0:
            terminals.add(node)
        elif node not in seen:
            seen.add(node)
            level, edges = diagrams.nodes[node]
            fields.add(diagrams.fields[level])
            queue += [child for _, child in edges]
    return frozenset(terminals), frozenset(fields)


def _both(diagrams: Diagrams, first: int, second: int, end: Callable[[int, int], int | None]) -> int:
    memo: dict[tuple[int, int], int] = {}

    def visit(first: int, second: int) -> int:
        ended = end(first, second)
        if ended is not None:
            return ended
        key = (first, second)
        if key not in memo:
            if len(memo) > STEPS:
                raise StepsExceeded
            level = min(diagrams.level(first), diagrams.level(second))
            memo[key] = _node(diagrams, level, ((mask, visit(a, b)) for mask, a, b in diagrams.pairs(first, second)))
        return memo[key]

    return visit(first, second)


def _node(diagrams: Diagrams, level: int, parts: Iterable[tuple[int, int]]) -> int:
    edges: dict[int, int] = {}
    for mask, child in parts:
        edges[child] = edges.get(child, 0) | mask
    return diagrams.node(level, edges)
