"""
One more token for less: on a GPU, to launch some hundred kernels takes longer than what they do for a single token. So
the launches are recorded once, as a CUDA graph, and from then on made together.
"""
import torch
from torch import Tensor

from model import GPT, Cache


class FixedCache(Cache):
    """A cache whose tensors, and all that is computed with them, keep their shapes and their places, as a graph needs
    it: the number of tokens read is a tensor, too, and a mask hides the places without a token."""

    def __init__(self, cache: Cache, n_read: int, read: Tensor, mask: Tensor) -> None:
        self.room, self.k, self.v = cache.room, cache.k, cache.v  # both (B, H, room, D)
        self.length = self.read = read  # (1,)
        self.mask = mask  # (1, room)
        for z in (self.k, self.v):
            z[:, :, n_read:] = 0  # memory that was never written may hold NaN, which no mask hides

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the k and v (B, H, 1, D) of one more token; return those of all places, (B, H, room, D)."""
        place = self.read % self.room
        self.k.index_copy_(2, place, k)
        self.v.index_copy_(2, place, v)
        return self.k, self.v


class Replay:
    """The logits of one token after the other. The first tokens of a text must have been read; then each call does what
    the model would do with their caches. On a CPU nothing is recorded, so that it can be tested there."""

    def __init__(self, model: GPT) -> None:
        self.model, self.run = model, self.work
        self.caches: list[Cache] = []  # of the text whose work is recorded
        self.side: torch.cuda.Stream | None = None

    def __call__(self, token: Tensor, caches: list[Cache]) -> Tensor:
        """token (B, 1) and the caches of what was before -> logits (B, V), which the next call overwrites"""
        if caches is not self.caches:
            self.begin(token, caches)
        self.token.copy_(token)
        self.run()
        for cache in caches:
            cache.length += 1
        return self.logits

    def begin(self, token: Tensor, caches: list[Cache]) -> None:
        """Make the caches of a text fixed, and record what one token takes."""
        self.run = self.work  # the graph before this one goes first, and with it what it has reserved
        self.caches, self.token = caches, token.clone()
        n_read, room = int(caches[0].length), caches[0].room
        self.places = torch.arange(room, device=token.device)
        self.read, self.mask = torch.full_like(self.places[:1], n_read), (self.places < n_read)[None]
        self.fixed: list[Cache] = [FixedCache(cache, n_read, self.read, self.mask) for cache in caches]
        if token.is_cuda:
            self.record()

    def work(self) -> None:
        torch.le(self.places, self.read, out=self.mask[0])  # beyond the room, a token takes the place of the oldest
        self.logits = self.model(self.token, logits='last', caches=self.fixed)[0][:, 0]
        self.read += 1

    def record(self) -> None:
        """Let `run` do at once what `work` does, with the same tensors. The work is done beforehand on a stream of its
        own, so that libraries reserve what they need."""
        before, self.side = self.read.clone(), self.side or torch.cuda.Stream()
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            for _ in range(3):
                self.work()
                self.read.copy_(before)  # the token that was read too early is read again
        torch.cuda.current_stream().wait_stream(self.side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.work()
        self.run = graph.replay
