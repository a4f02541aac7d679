"""The prefix tree: which full blocks of tokens are in the KV cache, and which are being computed."""

from __future__ import annotations

import heapq
from collections import deque

import numpy as np

from batchinfer.engine.blocks import BlockIds, BlockPool

TOKEN_BYTES = 4


class Node:
    """One full block of tokens after its parent's: ``key`` is the bytes of its int32 token ids.

    ``ready`` nodes are computed, and the tree owns their block. The others are *claimed*: a sequence
    is computing them. ``shared`` nodes were found by a second sequence. ``stamp`` orders nodes by last
    use, ``serial`` by creation.
    """

    __slots__ = ("block", "children", "key", "parent", "ready", "serial", "shared", "stamp")

    def __init__(self, parent: Node | None, key: bytes, block: int, serial: int) -> None:
        self.parent = parent
        self.key = key
        self.block = block
        self.serial = serial
        self.stamp = 0
        self.ready = self.shared = False
        self.children: dict[bytes, Node] = {}


class Chain:
    """A resident sequence's way down the tree.

    ``node`` is the last ready node whose block the sequence owns, None once its way and the tree's
    parted (it computed a block that the tree has from another sequence): it then enters no more
    blocks, so that whoever owns a node's block owns those of all its ancestors. ``claims`` are the
    nodes below that it has announced, topmost first.
    """

    __slots__ = ("claims", "node")

    def __init__(self, node: Node) -> None:
        self.node: Node | None = node
        self.claims: deque[Node] = deque()


class PrefixTree:
    """Full blocks by content, on a BlockPool; least recently used leaves are evicted first.

    Blocks are found by comparing their tokens (dictionary keys), never by a hash alone. All choices
    depend on the order of calls alone.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._width = block_size * TOKEN_BYTES
        self._root = Node(None, b"", -1, 0)
        self._root.ready = True
        self._by_block: list[Node | None] = [None] * pool.num_blocks
        # Leaves that became idle, by (stamp, serial). Entries of nodes used since then are stale and
        # are skipped when popped.
        self._leaves: list[tuple[int, int, Node]] = []
        self._unshared: list[tuple[int, int, Node]] = []  # those of them that only one sequence had
        self._serial = 0
        self._now = 0

    def match(self, data: bytes, limit: int) -> tuple[list[Node], Node | None]:
        """The ready nodes along ``data`` (int32 token ids), at most ``limit`` blocks.

        The second value is the deepest claimed node on the way, None if nobody is computing more of
        this prefix.
        """
        ready: list[Node] = []
        node, width = self._root, self._width
        for start in range(0, limit * width, width):
            child = node.children.get(data[start : start + width])
            if child is None:
                break
            node = child
            if node.ready:
                ready.append(node)
        return ready, None if node.ready else node

    def enter(self, data: bytes, matched: list[Node], blocks: BlockIds) -> Chain:
        """A sequence with tokens ``data`` becomes resident in ``blocks``, the first of them matched.

        Claims the full blocks that it is about to compute, as far as the tree does not have them.
        """
        for node in matched:
            node.shared = True
        node = matched[-1] if matched else self._root
        chain = Chain(node)
        width = self._width
        for number in range(len(matched), len(data) // width):
            key = data[number * width : (number + 1) * width]
            if key in node.children:
                break
            node = self._add(node, key, int(blocks[number]))
            chain.claims.append(node)
        return chain

    def advance(self, chain: Chain, key: bytes, block: int) -> Node | None:
        """The sequence's next full block is computed: enter it. Returns the claim that became ready."""
        if chain.node is None:
            return None
        if chain.claims:
            claim = chain.claims.popleft()
            self._make_ready(claim)
            chain.node = claim
            return claim
        if key in chain.node.children:
            chain.node = None
            return None
        chain.node = self._add(chain.node, key, block)
        self._make_ready(chain.node)
        return None

    def leave(self, chain: Chain) -> list[Node]:
        """The sequence gives up: its claims, which are returned, are no longer in the tree."""
        claims = list(chain.claims)
        for node in reversed(claims):
            assert node.parent is not None
            del node.parent.children[node.key]
        chain.claims.clear()
        chain.node = None
        return claims

    def touch_idle(self, ids: BlockIds) -> None:
        """Blocks, just released, that only the tree owns now: they are the most recently used."""
        if not ids.size:
            return
        self._now += 1
        for block in ids.tolist():
            node = self._by_block[block]
            assert node is not None
            node.stamp = self._now
            if not node.children:
                self._push(node)
        for leaves in (self._leaves, self._unshared):
            if len(leaves) > 2 * self._pool.num_blocks + 64:
                leaves[:] = [entry for entry in leaves if self._is_current(entry)]
                heapq.heapify(leaves)

    def evict(self, count: int) -> int:
        """Free up to ``count`` idle blocks, least recently used leaves first; returns how many.

        It is ``count`` whenever the pool has as many idle blocks: an idle node has only idle nodes
        below it, since owners of a node's block own those of its ancestors.
        """
        return self._evict(self._leaves, count)

    def evict_unshared(self, count: int) -> int:
        """The same of blocks that no second sequence has asked for."""
        return self._evict(self._unshared, count)

    def _evict(self, leaves: list[tuple[int, int, Node]], count: int) -> int:
        evicted = 0
        while evicted < count and leaves:
            entry = heapq.heappop(leaves)
            if not self._is_current(entry):
                continue
            node = entry[2]
            parent = node.parent
            assert parent is not None
            del parent.children[node.key]
            node.ready = False
            self._by_block[node.block] = None
            self._pool.evict(node.block)
            evicted += 1
            if parent is not self._root and not parent.children and self._is_idle(parent):
                self._push(parent)
        return evicted

    def _push(self, leaf: Node) -> None:
        for leaves in (self._leaves,) if leaf.shared else (self._leaves, self._unshared):
            heapq.heappush(leaves, (leaf.stamp, leaf.serial, leaf))

    def _is_idle(self, node: Node) -> bool:
        return node.ready and int(self._pool.references[node.block]) == 1

    def _is_current(self, entry: tuple[int, int, Node]) -> bool:
        stamp, _, node = entry
        return node.stamp == stamp and not node.children and self._is_idle(node)

    def _add(self, parent: Node, key: bytes, block: int) -> Node:
        self._serial += 1
        node = Node(parent, key, block, self._serial)
        parent.children[key] = node
        return node

    def _make_ready(self, node: Node) -> None:
        node.ready = True
        self._by_block[node.block] = node
        self._pool.cache(node.block)

    def check(self) -> None:
        """Assert that tree and pool agree: cached blocks are the ready nodes', claims lie below ready
        nodes only, idle nodes have only idle nodes below, and every idle leaf can be evicted."""
        current = {id(entry[2]) for entry in self._leaves if self._is_current(entry)}
        unshared = {id(entry[2]) for entry in self._unshared if self._is_current(entry)}
        cached = np.zeros(self._pool.num_blocks, np.bool_)
        nodes = [self._root]
        while nodes:
            node = nodes.pop()
            for key, child in node.children.items():
                assert child.key == key and child.parent is node, "a node under a wrong key"
                assert len(key) == self._width, "a node that is not a full block"
                assert node.ready or not child.ready, "a ready node below a claimed one"
                if node is not self._root and self._is_idle(node):
                    assert self._is_idle(child), "an idle node above one in use"
                nodes.append(child)
            if node is self._root or not node.ready:
                continue
            assert not cached[node.block], "a block in two nodes"
            cached[node.block] = True
            assert self._by_block[node.block] is node, "a block's node is another"
            if self._is_idle(node) and not node.children:
                assert id(node) in current, "an idle leaf that can't be evicted"
                assert node.shared == (id(node) not in unshared), "a leaf among the wrong ones"
        assert (cached == self._pool.cached).all(), "the tree and the pool disagree on cached blocks"
        assert sum(node is not None for node in self._by_block) == int(cached.sum()), "a dead node"
