"""Who uses which page of the KV cache, and beginnings of texts that are kept for the next prompt that begins in the same way.

A page holds PAGE positions of one text. A full page is never written again, so that several sequences and the tree of kept
beginnings share it; each of them counts as one user. Only whole pages and copies are shared, so nobody's page is ever changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mpo_runtime.backends.ops import PAGE, Pages


class PagePool:
    """Pages with a number of users each; those without one are free and are taken again first."""

    def __init__(self, store: Pages) -> None:
        self.store = store
        self._users: list[int] = [0] * store.count
        self._free: list[int] = list(range(store.count))

    def take(self) -> int:
        """A page with one user and undefined content; raises MemoryError where memory does not suffice for another one."""
        if not self._free:
            self.store.grow(self.store.count + 1)
            self._users.append(0)
            self._free.append(self.store.count - 1)
        page = self._free.pop()
        self._users[page] = 1
        return page

    def share(self, page: int) -> int:
        """The page, with one more user."""
        self._users[page] += 1
        return page

    def release(self, page: int) -> None:
        """Takes one user from a page."""
        self._users[page] -= 1
        if not self._users[page]:
            self._free.append(page)

    @property
    def used(self) -> int:
        """Pages that have users."""
        return self.store.count - len(self._free)

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages that have users."""
        return self.used * self.store.page_bytes


@dataclass(slots=True, eq=False)
class Node:
    """A page of a kept beginning: its tokens, at most PAGE of them, after those of its parents.

    exact: how many of the tokens were run as parts of a prompt after nothing but such tokens. The rest was run as generated
    text, which is rounded differently.
    """

    tokens: tuple[int, ...]
    page: int
    exact: int
    parent: Node | None
    used: int = 0
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)


class PrefixTree:
    """Kept beginnings of texts, page by page; above `budget` bytes the least recently used are dropped."""

    def __init__(self, pool: PagePool, budget: int) -> None:
        self.pool, self.budget = pool, budget
        self._root = Node((), -1, 0, None)
        self._nodes: set[Node] = set()
        self._clock = 0

    @property
    def kept_bytes(self) -> int:
        """Bytes of the kept pages, also of those that sequences use besides."""
        return len(self._nodes) * self.pool.store.page_bytes

    def match(self, ids: Sequence[int], *, exact: bool) -> list[tuple[Node, int]]:
        """The kept pages with which `ids` begins, and how many tokens of each: PAGE, except of the last one.

        Args:
            exact: counts tokens only that were run as parts of a prompt.
        """
        found: list[tuple[Node, int]] = []
        node, at = self._root, 0
        while True:
            whole = tuple(ids[at : at + PAGE])
            child = node.children.get(whole)
            usable = PAGE if child is not None and len(whole) == PAGE else 0
            if child is None or not usable:
                child, usable = self._longest(node, whole)
            if child is not None and exact:
                usable = min(usable, child.exact)
            if child is None or usable == 0:
                return found
            self._touch(child)
            found.append((child, usable))
            if usable < PAGE:
                return found
            node, at = child, at + PAGE

    @staticmethod
    def _longest(node: Node, ids: tuple[int, ...]) -> tuple[Node | None, int]:
        """The child that shares the longest beginning with `ids`, and its length."""
        best, length = None, 0
        for child in node.children.values():
            shared = shared_prefix(child.tokens, ids)
            if shared > length:
                best, length = child, shared
        return best, length

    def insert(self, ids: Sequence[int], pages: Sequence[int], exact: int) -> None:
        """Keeps the pages of a text, which shares them; the last one may be partly filled if nobody writes to it again.

        Args:
            exact: how many leading tokens were run as parts of a prompt.
        """
        node = self._root
        for index, page in enumerate(pages):
            at = index * PAGE
            tokens = tuple(ids[at : at + PAGE])
            if not tokens:
                break
            exact_here = min(max(exact - at, 0), len(tokens))
            child = node.children.get(tokens)
            if child is None:
                child = Node(tokens, self.pool.share(page), exact_here, node)
                node.children[tokens] = child
                self._nodes.add(child)
                self._drop_shorter(node, child)
            elif exact_here > child.exact:
                self.pool.release(child.page)
                child.page, child.exact = self.pool.share(page), exact_here
            self._touch(child)
            node = child
        self.trim()

    def _drop_shorter(self, node: Node, child: Node) -> None:
        """Drops a partly filled page whose tokens the new one begins with, unless it is more exact."""
        for other in list(node.children.values()):
            shorter = len(other.tokens) < len(child.tokens) and child.tokens[: len(other.tokens)] == other.tokens
            if shorter and other.exact <= child.exact:
                self._drop(other)

    def trim(self) -> None:
        """Drops the least recently used leaves until the kept bytes are within the budget."""
        while self._nodes and self.kept_bytes > self.budget:
            self._drop(min((node for node in self._nodes if not node.children), key=lambda node: node.used))

    def _drop(self, node: Node) -> None:
        for child in list(node.children.values()):
            self._drop(child)
        self.pool.release(node.page)
        self._nodes.discard(node)
        if node.parent is not None:
            del node.parent.children[node.tokens]

    def _touch(self, node: Node) -> None:
        self._clock += 1
        node.used = self._clock

    def latest(self) -> list[Node]:
        """The pages of the text that was used last, from its beginning; nothing where no text is kept."""
        path: list[Node] = []
        node: Node | None = max(self._nodes, key=lambda node: node.used, default=None)
        while node is not None and node is not self._root:
            path.append(node)
            node = node.parent
        return path[::-1]

    def clear(self) -> None:
        """Forgets everything."""
        for child in list(self._root.children.values()):
            self._drop(child)


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """The number of leading ids that are equal in both."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))
