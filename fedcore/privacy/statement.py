"""What a ledger's epsilon means, in words for whoever has to decide about data protection."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from fedcore.privacy.events import LEAST_SAMPLED_NOISE, DpSgd, Event, GaussianRelease, SkellamRelease, is_amplified

__all__ = ["Statement", "statement"]


@dataclass(frozen=True)
class Statement:
    """``adjacency``: the two cases that cannot be told apart. ``bound``: how epsilon was computed. ``released``, ``coordinator``:
    what each view assumes. ``not_concluded``: what must not be read into the numbers."""

    adjacency: str
    bound: str
    released: str
    coordinator: str
    not_concluded: tuple[str, ...]


def statement(events: Collection[Event]) -> Statement:
    """The words for ``events``, all of one unit."""
    if all(isinstance(event, DpSgd) for event in events):
        drawn = any(event.noise_multiplier < LEAST_SAMPLED_NOISE for event in events)
        return replace(_EXAMPLE, bound=_DRAWN) if drawn else _EXAMPLE
    amplified = any(is_amplified(event) for event in events)
    central = any(isinstance(event, GaussianRelease) for event in events)
    shared = any(isinstance(event, SkellamRelease) for event in events)
    return Statement(
        adjacency="one client with all of its examples took part, or its contribution is replaced by nothing (zero-out)",
        bound=_SKELLAM if shared else _SAMPLED if amplified else "exact curve of the Gaussian mechanism",
        released=_AMPLIFIED if amplified else _NOT_AMPLIFIED,
        coordinator=(
            "Someone sees all that is published and knows which client took part in which round. No amplification by sampling is "
            "counted. The number is that of the worst-off client, by all the rounds it took part in."
        ),
        not_concluded=tuple(
            text for text, holds in ((_CENTRAL, central), (_SHARED, shared), (_ONE_CLIENT, True), (_ELSEWHERE, True)) if holds
        ),
    )


_SAMPLED = "privacy loss distribution of the sampled Gaussian (dp-accounting), rounded upwards"
_DRAWN = (
    "upper bound by how often an example is drawn, up to several times too large: with noise this small an epsilon says nothing "
    "but that hardly anything is protected"
)
_SKELLAM = "certified bound for Skellam noise by integer Renyi orders (Agarwal et al. 2021), rounded upwards"
_AMPLIFIED = (
    "Someone sees the published models and nothing else. Each registered client joined a round by its own secret coin, whose bias "
    "is recorded. Neither who took part nor how many did is published; noise and denominator do not depend on it. If one of these "
    "does not hold, the coordinator view is the number to use."
)
_NOT_AMPLIFIED = (
    "Someone sees the published models. No amplification by sampling is claimed, so who took part may be known. The number is that "
    "of the worst-off client, by all the rounds it took part in."
)
_CENTRAL = (
    "It does not protect clients from the coordinator, which sees the sum before it adds the noise and has to be trusted with it."
)
_SHARED = (
    "It holds only while no more clients of a cohort than planned for leave out their noise or reveal it, and while the committee "
    "does not collude: the noise is the sum of the clients' shares. The number of survivors is public."
)
_ONE_CLIENT = "A person with two devices or two ids is two clients, each protected on its own; together they are protected less."
_ELSEWHERE = (
    "Facts outside this ledger are not counted: other releases of the same data, other populations that share clients with "
    "this one, and runs without privacy."
)
_EXAMPLE = Statement(
    adjacency="one training example of one client contributes to its steps, or contributes nothing (zero-out)",
    bound=_SAMPLED,
    released=(
        "Someone sees the published models. The client draws each batch by secret coins on the device, clips every example's "
        "gradient and adds the noise itself. The draw of cohorts is not counted as protection. The number is that of an example on "
        "the client that took part in the costliest set of rounds."
    ),
    coordinator=(
        "The coordinator sees each client's update and knows who took part. The noise is added on the device, so it learns no more "
        "than this number either."
    ),
    not_concluded=(
        "It does not protect a person: all examples of one client together are protected far less than one of them.",
        "It holds for a device that ran the training step as signed: clipping and noise are not checked from outside.",
        "That a client took part, and how many examples it has, is not hidden.",
        _ELSEWHERE,
    ),
)
