from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REASON_UNSPECIFIED: _ClassVar[Reason]
    MALFORMED: _ClassVar[Reason]
    TOKEN_REFUSED: _ClassVar[Reason]
    UNKNOWN_DEVICE: _ClassVar[Reason]
    BAD_SIGNATURE: _ClassVar[Reason]
    CLOCK: _ClassVar[Reason]
    REPLAYED: _ClassVar[Reason]
    REVOKED: _ClassVar[Reason]
    QUARANTINED: _ClassVar[Reason]
    TOO_FAST: _ClassVar[Reason]
    NO_SUCH_ROUND: _ClassVar[Reason]
    LATE: _ClassVar[Reason]
    OTHER_UPLOAD: _ClassVar[Reason]
    UNUSABLE: _ClassVar[Reason]
    NO_SUCH_BLOB: _ClassVar[Reason]
    PROTOCOL: _ClassVar[Reason]
    BUSY: _ClassVar[Reason]
    ENROLMENT_CLOSED: _ClassVar[Reason]
    EXPIRED: _ClassVar[Reason]

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_UNSPECIFIED: _ClassVar[Kind]
    TRAIN: _ClassVar[Kind]
    EVALUATE: _ClassVar[Kind]

class Aggregation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AGGREGATION_UNSPECIFIED: _ClassVar[Aggregation]
    MEAN: _ClassVar[Aggregation]
    EACH: _ClassVar[Aggregation]
    MASKED: _ClassVar[Aggregation]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    WORKING: _ClassVar[Outcome]
    UPLOADED: _ClassVar[Outcome]
    REFUSED_PLAN: _ClassVar[Outcome]
    INELIGIBLE: _ClassVar[Outcome]
    FAILED: _ClassVar[Outcome]
    GAVE_UP: _ClassVar[Outcome]
REASON_UNSPECIFIED: Reason
MALFORMED: Reason
TOKEN_REFUSED: Reason
UNKNOWN_DEVICE: Reason
BAD_SIGNATURE: Reason
CLOCK: Reason
REPLAYED: Reason
REVOKED: Reason
QUARANTINED: Reason
TOO_FAST: Reason
NO_SUCH_ROUND: Reason
LATE: Reason
OTHER_UPLOAD: Reason
UNUSABLE: Reason
NO_SUCH_BLOB: Reason
PROTOCOL: Reason
BUSY: Reason
ENROLMENT_CLOSED: Reason
EXPIRED: Reason
KIND_UNSPECIFIED: Kind
TRAIN: Kind
EVALUATE: Kind
AGGREGATION_UNSPECIFIED: Aggregation
MEAN: Aggregation
EACH: Aggregation
MASKED: Aggregation
OUTCOME_UNSPECIFIED: Outcome
WORKING: Outcome
UPLOADED: Outcome
REFUSED_PLAN: Outcome
INELIGIBLE: Outcome
FAILED: Outcome
GAVE_UP: Outcome

class SignedRequest(_message.Message):
    __slots__ = ("protocol", "deployment", "device", "counter", "time_ms", "nonce", "body", "signature")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    TIME_MS_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    deployment: str
    device: int
    counter: int
    time_ms: int
    nonce: bytes
    body: bytes
    signature: bytes
    def __init__(self, protocol: _Optional[int] = ..., deployment: _Optional[str] = ..., device: _Optional[int] = ..., counter: _Optional[int] = ..., time_ms: _Optional[int] = ..., nonce: _Optional[bytes] = ..., body: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class ServerTime(_message.Message):
    __slots__ = ("time_ms", "signature")
    TIME_MS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    time_ms: int
    signature: bytes
    def __init__(self, time_ms: _Optional[int] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("reason", "text", "retry_after_ms", "server_time", "lacks")
    REASON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_FIELD_NUMBER: _ClassVar[int]
    LACKS_FIELD_NUMBER: _ClassVar[int]
    reason: Reason
    text: str
    retry_after_ms: int
    server_time: ServerTime
    lacks: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, reason: _Optional[_Union[Reason, str]] = ..., text: _Optional[str] = ..., retry_after_ms: _Optional[int] = ..., server_time: _Optional[_Union[ServerTime, _Mapping]] = ..., lacks: _Optional[_Iterable[str]] = ...) -> None: ...

class EnrollRequest(_message.Message):
    __slots__ = ("protocol", "token_id", "algorithm", "public_key", "possession", "proof", "nonce")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    POSSESSION_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    token_id: bytes
    algorithm: int
    public_key: bytes
    possession: bytes
    proof: bytes
    nonce: bytes
    def __init__(self, protocol: _Optional[int] = ..., token_id: _Optional[bytes] = ..., algorithm: _Optional[int] = ..., public_key: _Optional[bytes] = ..., possession: _Optional[bytes] = ..., proof: _Optional[bytes] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class EnrollReply(_message.Message):
    __slots__ = ("trust", "enrolment", "server_time")
    TRUST_FIELD_NUMBER: _ClassVar[int]
    ENROLMENT_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_FIELD_NUMBER: _ClassVar[int]
    trust: bytes
    enrolment: bytes
    server_time: ServerTime
    def __init__(self, trust: _Optional[bytes] = ..., enrolment: _Optional[bytes] = ..., server_time: _Optional[_Union[ServerTime, _Mapping]] = ...) -> None: ...

class RenewBody(_message.Message):
    __slots__ = ("enrolment",)
    ENROLMENT_FIELD_NUMBER: _ClassVar[int]
    enrolment: bytes
    def __init__(self, enrolment: _Optional[bytes] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("enrolment", "server_time")
    ENROLMENT_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_FIELD_NUMBER: _ClassVar[int]
    enrolment: bytes
    server_time: ServerTime
    def __init__(self, enrolment: _Optional[bytes] = ..., server_time: _Optional[_Union[ServerTime, _Mapping]] = ...) -> None: ...

class CheckInBody(_message.Message):
    __slots__ = ("population", "model_version", "tier", "runtime", "capabilities", "labels", "agent_version", "round_key", "conditions")
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUND_KEY_FIELD_NUMBER: _ClassVar[int]
    CONDITIONS_FIELD_NUMBER: _ClassVar[int]
    population: str
    model_version: int
    tier: str
    runtime: str
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    labels: _containers.RepeatedScalarFieldContainer[str]
    agent_version: str
    round_key: bytes
    conditions: Conditions
    def __init__(self, population: _Optional[str] = ..., model_version: _Optional[int] = ..., tier: _Optional[str] = ..., runtime: _Optional[str] = ..., capabilities: _Optional[_Iterable[str]] = ..., labels: _Optional[_Iterable[str]] = ..., agent_version: _Optional[str] = ..., round_key: _Optional[bytes] = ..., conditions: _Optional[_Union[Conditions, _Mapping]] = ...) -> None: ...

class Conditions(_message.Message):
    __slots__ = ("charging", "unmetered", "idle", "battery_percent", "free_storage_bytes")
    CHARGING_FIELD_NUMBER: _ClassVar[int]
    UNMETERED_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    BATTERY_PERCENT_FIELD_NUMBER: _ClassVar[int]
    FREE_STORAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    charging: bool
    unmetered: bool
    idle: bool
    battery_percent: int
    free_storage_bytes: int
    def __init__(self, charging: _Optional[bool] = ..., unmetered: _Optional[bool] = ..., idle: _Optional[bool] = ..., battery_percent: _Optional[int] = ..., free_storage_bytes: _Optional[int] = ...) -> None: ...

class CheckInReply(_message.Message):
    __slots__ = ("server_time", "assignment", "wait", "lacks", "visit", "latest_model")
    SERVER_TIME_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    LACKS_FIELD_NUMBER: _ClassVar[int]
    VISIT_FIELD_NUMBER: _ClassVar[int]
    LATEST_MODEL_FIELD_NUMBER: _ClassVar[int]
    server_time: ServerTime
    assignment: Assignment
    wait: Wait
    lacks: _containers.RepeatedScalarFieldContainer[str]
    visit: Visit
    latest_model: int
    def __init__(self, server_time: _Optional[_Union[ServerTime, _Mapping]] = ..., assignment: _Optional[_Union[Assignment, _Mapping]] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., lacks: _Optional[_Iterable[str]] = ..., visit: _Optional[_Union[Visit, _Mapping]] = ..., latest_model: _Optional[int] = ...) -> None: ...

class Wait(_message.Message):
    __slots__ = ("retry_after_ms", "reason")
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    retry_after_ms: int
    reason: str
    def __init__(self, retry_after_ms: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Visit(_message.Message):
    __slots__ = ("task", "epoch", "expiry")
    TASK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    EXPIRY_FIELD_NUMBER: _ClassVar[int]
    task: str
    epoch: int
    expiry: int
    def __init__(self, task: _Optional[str] = ..., epoch: _Optional[int] = ..., expiry: _Optional[int] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("plan", "token", "invitation")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    INVITATION_FIELD_NUMBER: _ClassVar[int]
    plan: SignedPlan
    token: bytes
    invitation: bytes
    def __init__(self, plan: _Optional[_Union[SignedPlan, _Mapping]] = ..., token: _Optional[bytes] = ..., invitation: _Optional[bytes] = ...) -> None: ...

class SignedPlan(_message.Message):
    __slots__ = ("plan", "key", "signature")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    plan: bytes
    key: bytes
    signature: bytes
    def __init__(self, plan: _Optional[bytes] = ..., key: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("deployment", "task", "round", "kind", "aggregation", "issued_ms", "expires_ms", "blobs", "settings", "upload_encoding", "most_upload_bytes", "capabilities", "server_round", "values", "minimum_uploads")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    ISSUED_MS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_MS_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_ENCODING_FIELD_NUMBER: _ClassVar[int]
    MOST_UPLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    SERVER_ROUND_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_UPLOADS_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    task: str
    round: int
    kind: Kind
    aggregation: Aggregation
    issued_ms: int
    expires_ms: int
    blobs: _containers.RepeatedCompositeFieldContainer[Blob]
    settings: _containers.RepeatedCompositeFieldContainer[Setting]
    upload_encoding: str
    most_upload_bytes: int
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    server_round: int
    values: int
    minimum_uploads: int
    def __init__(self, deployment: _Optional[str] = ..., task: _Optional[str] = ..., round: _Optional[int] = ..., kind: _Optional[_Union[Kind, str]] = ..., aggregation: _Optional[_Union[Aggregation, str]] = ..., issued_ms: _Optional[int] = ..., expires_ms: _Optional[int] = ..., blobs: _Optional[_Iterable[_Union[Blob, _Mapping]]] = ..., settings: _Optional[_Iterable[_Union[Setting, _Mapping]]] = ..., upload_encoding: _Optional[str] = ..., most_upload_bytes: _Optional[int] = ..., capabilities: _Optional[_Iterable[str]] = ..., server_round: _Optional[int] = ..., values: _Optional[int] = ..., minimum_uploads: _Optional[int] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("name", "digest", "size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: bytes
    size: int
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...

class Setting(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: Value
    def __init__(self, name: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...

class Value(_message.Message):
    __slots__ = ("integer", "real", "text", "data", "flag", "list")
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    REAL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    integer: int
    real: float
    text: str
    data: bytes
    flag: bool
    list: Values
    def __init__(self, integer: _Optional[int] = ..., real: _Optional[float] = ..., text: _Optional[str] = ..., data: _Optional[bytes] = ..., flag: _Optional[bool] = ..., list: _Optional[_Union[Values, _Mapping]] = ...) -> None: ...

class Values(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedCompositeFieldContainer[Value]
    def __init__(self, values: _Optional[_Iterable[_Union[Value, _Mapping]]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("token", "digest", "offset", "length", "name")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    digest: bytes
    offset: int
    length: int
    name: str
    def __init__(self, token: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., name: _Optional[str] = ...) -> None: ...

class FetchReply(_message.Message):
    __slots__ = ("data", "total")
    DATA_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    total: int
    def __init__(self, data: _Optional[bytes] = ..., total: _Optional[int] = ...) -> None: ...

class StageRequest(_message.Message):
    __slots__ = ("token", "digest", "total", "offset", "data")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    digest: bytes
    total: int
    offset: int
    data: bytes
    def __init__(self, token: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., total: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class StageReply(_message.Message):
    __slots__ = ("staged",)
    STAGED_FIELD_NUMBER: _ClassVar[int]
    staged: int
    def __init__(self, staged: _Optional[int] = ...) -> None: ...

class UploadBody(_message.Message):
    __slots__ = ("token", "digest", "data")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    digest: bytes
    data: bytes
    def __init__(self, token: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadReply(_message.Message):
    __slots__ = ("repeated",)
    REPEATED_FIELD_NUMBER: _ClassVar[int]
    repeated: bool
    def __init__(self, repeated: _Optional[bool] = ...) -> None: ...

class ReportBody(_message.Message):
    __slots__ = ("token", "outcome", "text", "fetch_ms", "train_ms", "upload_ms", "peak_memory_bytes", "steps", "examples", "loss", "model_version")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FETCH_MS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_MS_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_MS_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    outcome: Outcome
    text: str
    fetch_ms: int
    train_ms: int
    upload_ms: int
    peak_memory_bytes: int
    steps: int
    examples: int
    loss: float
    model_version: int
    def __init__(self, token: _Optional[bytes] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., text: _Optional[str] = ..., fetch_ms: _Optional[int] = ..., train_ms: _Optional[int] = ..., upload_ms: _Optional[int] = ..., peak_memory_bytes: _Optional[int] = ..., steps: _Optional[int] = ..., examples: _Optional[int] = ..., loss: _Optional[float] = ..., model_version: _Optional[int] = ...) -> None: ...

class ReportReply(_message.Message):
    __slots__ = ("stop", "reason")
    STOP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    stop: bool
    reason: str
    def __init__(self, stop: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class ForgetReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReleaseBody(_message.Message):
    __slots__ = ("model", "tier", "runtime", "hardware", "version", "health", "labels")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    model: str
    tier: str
    runtime: str
    hardware: str
    version: int
    health: _containers.RepeatedCompositeFieldContainer[Health]
    labels: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., tier: _Optional[str] = ..., runtime: _Optional[str] = ..., hardware: _Optional[str] = ..., version: _Optional[int] = ..., health: _Optional[_Iterable[_Union[Health, _Mapping]]] = ..., labels: _Optional[_Iterable[str]] = ...) -> None: ...

class Health(_message.Message):
    __slots__ = ("rollout", "version", "measures", "refused")
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MEASURES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    rollout: str
    version: int
    measures: _containers.RepeatedCompositeFieldContainer[Measure]
    refused: str
    def __init__(self, rollout: _Optional[str] = ..., version: _Optional[int] = ..., measures: _Optional[_Iterable[_Union[Measure, _Mapping]]] = ..., refused: _Optional[str] = ...) -> None: ...

class Measure(_message.Message):
    __slots__ = ("signal", "value")
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    signal: str
    value: float
    def __init__(self, signal: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ("server_time", "assignment", "token", "retry_after_ms", "reason")
    SERVER_TIME_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    server_time: ServerTime
    assignment: bytes
    token: bytes
    retry_after_ms: int
    reason: str
    def __init__(self, server_time: _Optional[_Union[ServerTime, _Mapping]] = ..., assignment: _Optional[bytes] = ..., token: _Optional[bytes] = ..., retry_after_ms: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...
