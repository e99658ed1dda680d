"""Every Redis key name: what is stored in, the key out. Keys of one partition share the hash tag {partition}."""

from __future__ import annotations


def events(lane: str, partition: int) -> str:
    """Stream: one entry holds the events of one request for this lane and partition."""
    return f"aemos:events:{lane}:{{{partition}}}"


def ledger(lane: str, partition: int) -> str:
    """Hash of exact counts in events: accepted, processed, duplicate, dead, depth."""
    return f"aemos:ledger:{lane}:{{{partition}}}"


def backlog(lane: str, partition: int) -> str:
    """Hash: organization id -> events of its that the slot holds."""
    return f"aemos:backlog:{lane}:{{{partition}}}"


def delayed(lane: str, partition: int) -> str:
    """Sorted set of events that wait for another attempt; the score is the due time in ms."""
    return f"aemos:delayed:{lane}:{{{partition}}}"


def ticket(lane: str, partition: int) -> str:
    """Flag that expires: a drain ticket is queued for the partition."""
    return f"aemos:ticket:{lane}:{{{partition}}}"


def lease(lane: str, partition: int) -> str:
    """Fencing token of the worker that drains the partition."""
    return f"aemos:lease:{lane}:{{{partition}}}"


def suspect(lane: str, partition: int) -> str:
    """Id of the event that is being decided while a worker takes over what another one died on."""
    return f"aemos:suspect:{lane}:{{{partition}}}"


def remembered(partition: int, watch: str) -> str:
    """JSON that expires: what a condition over time remembers of a source of this partition."""
    return f"aemos:remembered:{{{partition}}}:{watch}"


def stalled(lane: str, partition: int) -> str:
    """Text that expires: why the partition waits (database away, for example)."""
    return f"aemos:stalled:{lane}:{{{partition}}}"


def latest(source_type: str, uuid: str) -> str:
    """Hash: variable or state name -> packed (timestamp in us, value), the newest known."""
    return f"aemos:latest:{source_type}:{uuid}"


def told(device_uuid: str) -> str:
    """Hash that expires: state -> number of the newest change of it that the stream got. On the server of the stream."""
    return f"aemos:told:{{{NOTIFICATIONS}}}:{device_uuid}"


NOTIFICATIONS = "aemos:notifications"  # stream the gateways read
NOTIFICATIONS_MQTT_GROUP = "mqtt"
TIMERS = (
    "aemos:timers"  # sorted set: chain and source -> when its outcome may change by itself, in ms; inf for not at all
)
TIMERS_LOOKED_FOR = "aemos:timers-looked-for"  # flag that expires: chains that need a timer were looked for
TIMERS_STIRRED = (
    "aemos:timers-stirred"  # set: device|uuid of those with a state that changed, until the scheduler looks at chains
)
SCHEDULER_LEADER = "aemos:scheduler:leader"
MQTT_TELEMETRY_LEADER = "aemos:mqtt-telemetry:leader"
MQTT_REPORTS_LEADER = "aemos:mqtt-reports:leader"
MQTT_PUBLISHER_LEADER = "aemos:mqtt-publisher:leader"
BROKER_SYNC_LEADER = "aemos:broker-sync:leader"
REJECTED = "aemos:rejected"  # hash: reason -> refused events; "unrecorded" -> those of them that were not kept


def replay_ticket(uuid: str) -> str:
    """Flag that expires: the next step of the replay is queued."""
    return f"aemos:replay-ticket:{uuid}"


def replay_lease(uuid: str) -> str:
    """Flag that expires: a worker does a step of the replay."""
    return f"aemos:replay-lease:{uuid}"


def replay_pace(uuid: str) -> str:
    """Time in seconds up to which the replay has used its rate; expires."""
    return f"aemos:replay-pace:{uuid}"


OVERDUE_SEEN = "aemos:notifications:overdue-seen"  # flag that expires: overdue deliveries were looked for
TELEMETRY = "aemos:telemetry"  # channel: readings that somebody watches, from workers to gateways
TELEMETRY_WANTED = "aemos:telemetry:wanted"  # sorted set: variable id -> until when (s) a gateway wants its readings
RETENTION_DONE = "aemos:retention-done"  # flag that expires: what is too old was deleted within the last hour
NOTIFICATION_RETENTION_DONE = "aemos:notifications:retention-done"  # the same for notifications
METRICS = "aemos:metrics"  # hash: metric and label values -> sum of what all processes counted
