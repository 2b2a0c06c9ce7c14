"""Which place a step may have, and the reason for each refusal. Pure.

A place is chosen among those that fit now: where the fewest bytes have to travel (to NEARBY), then in the order in
which the step or its pool names them; a step that names none gets the one with the most room, and leaves machines with
cards to those that need one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlpiped.backends.base import Capacity, Card

Spot = tuple[int, int]
"""(run id, step index)"""

NEARBY = 16 << 20
"""So many bytes travel in no time: less does not outweigh the order in which somebody named the computes."""


@dataclass(frozen=True, slots=True)
class Need:
    """One step that waits for a place. `computes`: names in order of preference, empty for any."""

    run: int
    index: int
    priority: int = 0
    slots: int = 1
    cpus: float = 1.0
    memory: int | None = None
    computes: tuple[str, ...] = ()
    gpus: int = 0
    gpu_memory: int | None = None  # bytes of each card: it may be shared; None: the cards are the step's alone
    owner: str = ""
    images: bool = False  # it has an image: it runs in containers only
    nodes: int = 1
    cluster: bool = False  # only a cluster can start it
    modules: bool = False  # it needs environment modules
    sif: bool = False  # its image is a file
    data: Mapping[str, int] = field(default_factory=dict, compare=False)  # compute -> bytes that would have to travel

    @property
    def spot(self) -> Spot:
        return self.run, self.index

    def rank(self) -> tuple[int, int, int]:
        return (-self.priority, self.run, self.index)

    def shape(self) -> tuple[object, ...]:
        """Two needs of one shape fit where either does."""
        return (
            self.slots,
            self.cpus,
            self.memory,
            self.computes,
            self.gpus,
            self.gpu_memory,
            self.images,
            self.nodes,
            self.cluster,
            self.modules,
            self.sif,
        )


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a step cannot have a place. `head`, who holds what is missing (`spots`), `tail` make the sentence.

    never: whatever goes on there · away: nothing is sent there now · gpu: its cards are taken · full: anything else is.
    """

    kind: Literal["never", "away", "gpu", "full"]
    head: str
    spots: tuple[Spot, ...] = ()
    joint: str = ", held by "
    tail: str = ""
    since: int | None = None  # µs: it is so

    def text(self, holders: str = "") -> str:
        return self.head + (f"{self.joint}{holders}" if holders else "") + self.tail


@dataclass(slots=True)
class Place:
    """One compute: what it has and what is taken. `unwell` is a sentence while nothing may be sent there."""

    name: str
    slots: int
    cpus: float | None = None
    memory: int | None = None
    used_slots: int = 0
    used_cpus: float = 0.0
    used_memory: int = 0
    unwell: str | None = None
    unwell_since: int | None = None  # µs
    drained: bool = False
    drained_by: str = ""
    drained_since: int | None = None  # µs
    images: bool = False
    nodes: int | None = 1
    cluster: bool = False
    modules: bool = False
    sifs: bool = False
    cards: tuple[Card, ...] = ()
    no_cards: str | None = None  # why they cannot be used, in a sentence
    holders: dict[Spot, Need] = field(default_factory=dict)
    leased: dict[str, dict[Spot, int | None]] = field(default_factory=dict)  # card -> bytes for each; None: all of it
    late: set[Spot] = field(default_factory=set)  # of `holders`, those placed while it was kept for somebody else

    def offers(self, capacity: Capacity) -> None:
        """What its backend says that it has, now."""
        self.slots, self.cpus, self.memory = capacity.slots, capacity.cpus, capacity.memory
        self.images, self.modules, self.sifs = capacity.images, capacity.modules, capacity.sifs
        self.cards, self.no_cards = capacity.cards, capacity.no_cards
        self.cluster, self.nodes = capacity.cluster, capacity.nodes

    # --- why not ----------------------------------------------------------------------------------------------
    def refusal(self, need: Need) -> Refusal | None:
        """Why `need` cannot have a place here now, or None."""
        return next(iter(self.refusals(need)), None)

    def refusals(self, need: Need) -> list[Refusal]:
        """All that keeps `need` out now, so that it fits as soon as all of it is gone. What lasts for ever, or keeps
        everybody out, stands for the rest."""
        first = self._never(need) or self._away()
        if first is not None:
            return [first]
        no_card = self._no_card(need)
        return self._full(need) if no_card is None else [*self._full(need), no_card]

    def could_ever(self, need: Need) -> bool:
        """Whether `need` fits when nothing else is here."""
        return self._never(need) is None

    def could_soon(self, need: Need) -> bool:
        """Whether `need` fits as soon as what is here of ours has ended."""
        return self._never(need) is None and self._away() is None and len(self._usable(need)) >= need.gpus

    def full(self) -> bool:
        return self.unwell is not None or self.drained or self.used_slots >= self.slots

    def _never(self, need: Need) -> Refusal | None:
        if need.sif and not self.sifs:
            return Refusal("never", f"{self.name} runs no images that are files")
        if need.images != self.images:
            why = "runs containers only, and the step has no image" if self.images else "runs no containers"
            return Refusal("never", f"{self.name} {why}")
        if need.cluster and not self.cluster:
            asked = f"{need.nodes} nodes are asked for" if need.nodes > 1 else "the step is started by srun"
            return Refusal("never", f"{self.name} is no cluster, and {asked}")
        if self.nodes is not None and need.nodes > self.nodes:
            return Refusal("never", f"{self.name} has {_nodes(self.nodes)} in all, {need.nodes} are asked for")
        if need.modules and not self.modules:
            return Refusal("never", f"{self.name} loads no environment modules")
        if need.slots > self.slots:
            return Refusal("never", f"{self.name} has {_slots(self.slots)} in all, {need.slots} are asked for")
        if self.memory is not None and (need.memory or 0) > self.memory:
            has, asked = _told_apart(self.memory, need.memory or 0)
            return Refusal("never", f"{self.name} has {has} of memory in all, {asked} are asked for")
        if self.cpus is not None and need.cpus > self.cpus:
            return Refusal("never", f"{self.name} has {self.cpus:g} CPUs in all, {need.cpus:g} are asked for")
        if not need.gpus or self.no_cards is not None or (self.unwell is not None and not self.cards):
            return None  # what cannot be seen just now may be there
        if need.gpus > len(self.cards):
            return Refusal("never", f"{self.name} has {_gpus(len(self.cards))}" + _in_all(len(self.cards), need.gpus))
        fit = sum(_size(card) >= (need.gpu_memory or 0) for card in self.cards)
        if fit < need.gpus:
            large = f"with {_bytes(need.gpu_memory or 0)} of memory"
            return Refusal("never", f"{self.name} has {_gpus(fit)} {large}" + _in_all(fit, need.gpus))
        return None

    def _away(self) -> Refusal | None:
        if self.drained:
            by = f" by {self.drained_by}" if self.drained_by else ""
            what = f"{self.name} is drained{by}: its steps finish, nothing new starts"
            return Refusal("away", what, since=self.drained_since)
        if self.unwell is not None:
            return Refusal("away", f"{self.name}: {self.unwell}", since=self.unwell_since)
        return None

    def _full(self, need: Need) -> list[Refusal]:
        found = []
        if self.used_slots + need.slots > self.slots:
            asked = f", {need.slots} are asked for" if need.slots > 1 else ""
            what = f"{_slots(self.slots)}, {self.used_slots} in use{asked}"
            found.append((what, [spot for spot, held in self.holders.items() if held.slots]))
        if self.cpus is not None and self.used_cpus + need.cpus > self.cpus:
            free_cpus = max(0, self.cpus - self.used_cpus)
            what = f"{free_cpus:g} CPU{'s' * (free_cpus != 1)} free, {need.cpus:g} are asked for"
            found.append((what, [*self.holders]))
        if self.memory is not None and self.used_memory + (need.memory or 0) > self.memory:
            free, asked = _told_apart(max(0, self.memory - self.used_memory), need.memory or 0)
            what = f"{free} of memory free, {asked} are asked for"
            found.append((what, [spot for spot, held in self.holders.items() if held.memory]))
        return [Refusal("full", f"{self.name} has {what}", tuple(spots)) for what, spots in found]

    def _no_card(self, need: Need) -> Refusal | None:
        if not need.gpus or len(self.pick(need)) == need.gpus:
            return None
        if not self.cards or self.no_cards is not None:
            return Refusal("away", f"{self.name}: {self.no_cards or 'its GPUs have not been seen'}")
        large = [card for card in self.cards if _size(card) >= (need.gpu_memory or 0)]
        foreign = [f"card {card.index} is {card.foreign}" for card in large if card.foreign is not None]
        taken = [card for card in large if self._left(card, need) is not None]
        if not taken:
            return Refusal("gpu", f"{self.name}: {'; '.join(foreign)}")
        spots = tuple(dict.fromkeys(spot for card in taken for spot in self.leased[card.uuid]))
        some, total = len(taken), len(large)
        how = "" if total == 1 else " both" if some == total == 2 else f" all {some}" if some == total else f" {some}"
        which = f" with {_bytes(need.gpu_memory or 0)} of memory" if total < len(self.cards) else ""
        left = [(card, *_told_apart(free, need.gpu_memory or 0)) for card in taken if (free := self._left(card, need))]
        shared = [f"card {card.index} has {free} free, {asked} are asked for" for card, free, asked in left]
        tail = "".join(f"; {each}" for each in (*shared, *foreign))
        return Refusal("gpu", f"{self.name} has {total}{which},{how} held", spots, " by ", tail)

    # --- cards ------------------------------------------------------------------------------------------------
    def pick(self, need: Need) -> tuple[str, ...]:
        """The cards that it would get now: as many as it asks for, or fewer. Of shared ones the fullest that fits."""
        if not need.gpus or self.no_cards is not None:
            return ()
        found = []
        for position, card in enumerate(self._usable(need)):
            if not self.leased.get(card.uuid):
                found.append((1, 0, position, card.uuid))
            elif self._left(card, need) is None:
                found.append((0, self._free(card), position, card.uuid))
        return tuple(uuid for *_, uuid in sorted(found)[: need.gpus])

    def _left(self, card: Card, need: Need) -> int | None:
        """Of a card that keeps `need` off, the bytes that others could share; None: it can have it."""
        on = self.leased.get(card.uuid)
        if not on:
            return None
        if need.gpu_memory is None or None in on.values():
            return 0
        free = self._free(card)
        return None if free >= need.gpu_memory else free

    def _free(self, card: Card) -> int:
        """Bytes that no step of ours has reserved on a card that is shared."""
        return _size(card) - sum(bytes_ or 0 for bytes_ in self.leased[card.uuid].values())

    def _usable(self, need: Need) -> list[Card]:
        """Those that nobody else is on, and large enough."""
        least = need.gpu_memory or 0
        return [card for card in self.cards if card.foreign is None and _size(card) >= least]

    # --- taken and given back ---------------------------------------------------------------------------------
    def take(self, need: Need, cards: Sequence[str] | None = None, *, late: bool = False) -> tuple[str, ...]:
        """The cards that it has now. `cards`: those that it has already, of an attempt that is adopted."""
        uuids = self.pick(need) if cards is None else tuple(cards)
        self.holders[need.spot] = need
        self.used_slots += need.slots
        self.used_cpus += need.cpus
        self.used_memory += need.memory or 0
        for uuid in uuids:
            self.leased.setdefault(uuid, {})[need.spot] = need.gpu_memory
        if late:
            self.late.add(need.spot)
        return uuids

    def give_back(self, run: int, index: int) -> Need | None:
        need = self.holders.pop((run, index), None)
        if need is None:
            return None
        self.used_slots -= need.slots
        self.used_cpus -= need.cpus
        self.used_memory -= need.memory or 0
        self.late.discard((run, index))
        if need.gpus:
            for uuid in [uuid for uuid, on in self.leased.items() if on.pop(need.spot, 0) != 0 and not on]:
                del self.leased[uuid]
        return need

    def leaves_room(self, need: Need, first: Need) -> bool:
        """Whether `need` may come here although it is kept for `first`: both fit, with all that came so before."""
        after = [self.holders[spot] for spot in self.late] + [need, first]
        if sum(each.slots for each in after) > self.slots:
            return False
        if self.cpus is not None and sum(each.cpus for each in after) > self.cpus:
            return False
        if self.memory is not None and sum(each.memory or 0 for each in after) > self.memory:
            return False
        if not first.gpus or not need.gpus:
            return True
        on_late = sum(not self.late.isdisjoint(spots) for spots in self.leased.values())
        return on_late + need.gpus + first.gpus <= len(self._usable(first))


def candidates(need: Need, places: Sequence[Place]) -> list[Place]:
    if not need.computes:
        return list(places)
    by_name = {place.name: place for place in places}
    return [by_name[name] for name in need.computes if name in by_name]


def choose(need: Need, places: Sequence[Place], kept: Mapping[str, Need] | None = None) -> Place | None:
    """The best place that fits now. `kept`: those that are kept for a step that comes before this one."""
    best: tuple[tuple[float, ...], Place] | None = None
    for position, place in enumerate(candidates(need, places)):
        if place.refusal(need) is not None:
            continue
        if kept and place.name in kept and not place.leaves_room(need, kept[place.name]):
            continue
        order: tuple[float, ...] = (need.data.get(place.name, 0) // NEARBY,)
        if not need.computes:
            order += (bool(place.cards) and not need.gpus, place.used_slots / place.slots)
        if best is None or (*order, position) < best[0]:
            best = ((*order, position), place)
    return None if best is None else best[1]


def refusals(need: Need, places: Sequence[Place]) -> list[Refusal]:
    """For each compute that could take it, why not now; for none of them why never."""
    found = candidates(need, places)
    if not found:
        names = " or ".join(f"`{name}`" for name in need.computes)
        return [Refusal("never", f"no compute named {names} in the config")]
    reasons = [reason for place in found for reason in place.refusals(need)]
    if any(place.could_ever(need) for place in found):
        reasons = [reason for reason in reasons if reason.kind != "never"]
    return reasons


def _slots(n: int) -> str:
    return "1 slot" if n == 1 else f"{n} slots"


def _gpus(n: int) -> str:
    return "no GPU" if n == 0 else "1 GPU" if n == 1 else f"{n} GPUs"


def _nodes(n: int) -> str:
    return "1 node" if n == 1 else f"{n} nodes"


def _in_all(n: int, asked: int) -> str:
    return f" in all, {asked} are asked for" if n else ""


def _size(card: Card) -> int:
    """In whole G, as it is sold: of 24G a driver keeps some, and shares of 12G are meant to be halves."""
    return -(-card.memory // (1 << 30)) << 30


def _told_apart(has: int, asked: int) -> tuple[str, str]:
    """Both, so exactly that they differ."""
    if _bytes(has) != _bytes(asked):
        return _bytes(has), _bytes(asked)
    return f"{has / (1 << 20):.10g}M", f"{asked / (1 << 20):.10g}M"


def _bytes(n: int) -> str:
    for unit, size in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n}B"
