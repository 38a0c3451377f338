"""What a coordinator without scruples, and a member that helps it, can make in secure aggregation."""

from secagg_world import NOW, TASK

from fedcore.secagg.messages import (
    CERTIFICATION,
    Certification,
    ReleaseRequest,
    Survivors,
)


def certification(world, current, member, survivors) -> Certification:
    """A corrupt member's signature on whatever it is asked."""
    parts = (member, TASK, current.header.round, current.coordinator.plan(NOW).hash, survivors.hash)
    signature = world.member_keys[member - 1].sign(CERTIFICATION, Certification(*parts, bytes(64)).content())
    return Certification(*parts, signature)


def listing(current, indices) -> Survivors:
    return Survivors(current.coordinator._listed(sorted(indices)))


def release_request(current, survivors, certifications, member) -> bytes:
    deposits = tuple(current.coordinator._deposit(survivor.index, member) for survivor in survivors.clients)
    return ReleaseRequest(current.coordinator._agreed[0], survivors, tuple(certifications), deposits).encode()
