"""
The names of the attributes of spans, metrics and resources, for the code that writes them and the code that reads them.

OpenTelemetry calls such a list semantic conventions. Nothing here acts.
"""

from __future__ import annotations

from gpuscope._data.batch import RowFlag

STAGE = "gpuscope.stage"

WARMUP = "gpuscope.warmup"
"""This and the next five are flags: true, or absent."""
CAPTURED = "gpuscope.captured"
CLAMPED = "gpuscope.clamped"
GIVEN_UP = "gpuscope.given_up"
GRAPH = "gpuscope.graph"
"""On the GPU span of a stage inside a replay of a CUDA graph."""
UNPLACED = "gpuscope.unplaced"
"""On a GPU span whose duration alone is known."""
TRIMMED = "gpuscope.trimmed"
"""On a GPU span from which what its two events took was taken off."""
NOT_ENDED = "gpuscope.not_ended"
"""On a stage from a flight recorder that still ran; its end is the last moment that is known."""

KEEP = "gpuscope.keep"
"""Set by a program on any stage: its trace is kept, where `GPUSCOPE_KEEP` decides which are."""

HOST_DURATION = "gpuscope.host.duration"
"""This and the next three are in seconds."""
GPU_DURATION = "gpuscope.gpu.duration"
LAUNCH_TO_START = "gpuscope.launch_to_start"
CLOCK_UNCERTAINTY = "gpuscope.clock.uncertainty"
"""How far off the GPU span's place may be, plus or minus. A metric has the same name (`_data.metrics`)."""
GRAPH_OUTSIDE = "gpuscope.graph.outside"
"""Seconds of a stage's replays of CUDA graphs that lie in no stage inside. Only viewers show it."""

GPU_SAMPLES = "gpuscope.gpu.samples"
"""On a GPU span: how often its stream was asked for work while the stream was in this stage and in none inside it."""
GPU_HAD_WORK = "gpuscope.gpu.had_work"
"""The part of these answers, from 0 to 1, that found work queued or running."""

CUDA_STREAM = "gpuscope.cuda.stream"
DEVICE_INDEX = "gpuscope.device.index"

SHARED = "gpuscope.batch.shared"
"""A flag of the light span that a batch has in a member's trace, and of its GPU span: they repeat the batch's times."""
BATCH_SIZE, BATCH_POSITION = "gpuscope.batch.size", "gpuscope.batch.position"
"""How many members the batch has, and which of them this is, counted from 0."""
BATCH_WAIT = "gpuscope.batch.wait"
"""Seconds from the member's token to the beginning of the batch, 0 at least."""
BATCH_BASIS = "gpuscope.batch.basis"
"""What the GPU time is allotted by: `equal`, `weights`, or the application's own word for its weights."""
GPU_SHARE = "gpuscope.gpu.share"
"""Whole nanoseconds of the batch's GPU time that are allotted to this member: no measurement. Those of all add up."""
BATCH_STEPS = "gpuscope.batch.steps"
"""Of a generation's light span: how many batches it sums."""
PREFILL_SHARE, DECODE_SHARE = "gpuscope.gpu.share.prefill", "gpuscope.gpu.share.decode"
"""The share of the steps up to the first token, and of those after it; together they are the share."""
GPU_FIRST_TOKEN, GPU_PER_TOKEN = "gpuscope.gpu.time_to_first_token", "gpuscope.gpu.time_per_output_token"
"""
Seconds until the step that makes the first token was done on the GPU, and from there per further token. Metrics have
the same names.
"""

STALL = "gpuscope.stall"
"""An event of a stage's span: nothing began or ended in it for longer than `GPUSCOPE_STALL` allows."""
STALL_KIND, STALL_DURATION = "gpuscope.stall.kind", "gpuscope.stall.duration"
"""Which kind of stall it was, also of a metric; and how many seconds there had been no progress when it was found."""

LANE = "gpuscope.lane"
"""Of a metric: whether the duration was measured on the `host` or on the `gpu`."""
REASON = "gpuscope.reason"
"""
Of a metric: why stages were dropped or lost, or have no GPU times; what held a GPU's clocks down; what other processes
on it did.
"""
REQUEST = "gpuscope.request"
"""Of a metric: the name of the outermost stage, the kind of request."""
GPU_PART = "gpuscope.gpu.part"
"""Of a metric: true where the process has an instance of a GPU (MIG), and the figures are the whole GPU's."""

INPUT_LENGTH, NEW_TOKENS = "input_length", "new_tokens"
"""Of a stage that generates: tokens of one sequence, given and made."""

GC_EVENT = "gpuscope.gc"
"""An event of each stage that was open, on any thread, while Python collected garbage. Its time is when that began."""
GC_DURATION, GC_GENERATION = "gpuscope.gc.duration", "gpuscope.gc.generation"
"""Of that event: nanoseconds, a whole number; 0, 1 or 2. The metric of the first name is in seconds."""

COMPILE_SPAN = "torch.compile"
"""The name of the stage that stands for a compilation, in the request that waited for it."""
COMPILE_KIND, COMPILE_ID = "gpuscope.compile.kind", "gpuscope.compile.id"
"""
Of that stage: `compile`, `recompile` (the same frame once more), `backward`, `autotuning`, or `graph_recording` (of a
CUDA graph). The id is PyTorch's: the number of the frame, and how often that was compiled before.
"""
EAGER_AGAIN = "gpuscope.graph.eager_again"
"""On a stage: true where its runs replayed CUDA graphs, and the last ones, this one included, replay none."""

SYNCS = "gpuscope.syncs"
"""Of a stage during a watch: lines that waited for the GPU or copied pageable memory, as text, 16 at most."""
SYNC_COUNT, SYNC_BYTES = "gpuscope.sync.count", "gpuscope.sync.bytes"
"""How often that was, and the bytes that were copied, as far as they are known."""

MEMORY_BEGIN, MEMORY_END, MEMORY_PEAK = "gpuscope.memory.begin", "gpuscope.memory.end", "gpuscope.memory.peak"
"""Bytes that PyTorch's CUDA allocator had given out on the stage's device."""
MEMORY_RETRIES, MEMORY_MALLOCS = "gpuscope.memory.retries", "gpuscope.memory.mallocs"
"""How often, within the stage, the allocator freed its cache to try again; how often it took memory of the driver."""
OF_ONE_RUN = frozenset(
    (SYNCS, SYNC_COUNT, SYNC_BYTES, MEMORY_BEGIN, MEMORY_END, MEMORY_PEAK, MEMORY_RETRIES, MEMORY_MALLOCS)
)
"""What was found of one run stands beside what the program said of the stage, and holds for no further run."""

RANK = "gpuscope.rank"
"""This and the next two describe the process; OpenTelemetry has no names for them."""
LOCAL_RANK = "gpuscope.local_rank"
WORLD_SIZE = "gpuscope.world_size"

# OpenTelemetry's names.
FUNCTION, FILE, LINE = "code.function.name", "code.file.path", "code.line.number"
THREAD_ID, THREAD_NAME = "thread.id", "thread.name"
HW_ID, HW_TYPE, HW_MODEL, HW_VENDOR = "hw.id", "hw.type", "hw.model", "hw.vendor"
HW_NAME = "hw.name"
"""What earlier versions called `hw.model`. It is read, and no longer written: nobody has given a GPU a name."""
OPERATION, PROVIDER, REQUEST_MODEL = "gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model"
INPUT_TOKENS, OUTPUT_TOKENS = "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"
"""Of all sequences of a call together."""
TIME_TO_FIRST_TOKEN, TIME_PER_OUTPUT_TOKEN = "gen_ai.server.time_to_first_token", "gen_ai.server.time_per_output_token"
"""Seconds, as metrics of these names: of a generation, by the host's clock."""
EXCEPTION_TYPE, EXCEPTION_MESSAGE = "exception.type", "exception.message"
EXCEPTION_STACKTRACE, EXCEPTION_ESCAPED = "exception.stacktrace", "exception.escaped"
ERROR_TYPE = "error.type"
SERVICE_NAME, SERVICE_INSTANCE_ID = "service.name", "service.instance.id"
HOST_NAME, PROCESS_PID = "host.name", "process.pid"

FLAGS = {
    RowFlag.WARMUP: WARMUP,
    RowFlag.CAPTURED: CAPTURED,
    RowFlag.CLAMPED: CLAMPED,
    RowFlag.GIVEN_UP: GIVEN_UP,
    RowFlag.IN_GRAPH: GRAPH,
    RowFlag.UNPLACED: UNPLACED,
    RowFlag.SHARED: SHARED,
    RowFlag.NOT_ENDED: NOT_ENDED,
    RowFlag.TRIMMED: TRIMMED,
}
"""The attribute for each flag of a row. `REMOTE_PARENT` has none, because a span has a field for it."""
_OF_HOST = RowFlag.WARMUP, RowFlag.CAPTURED, RowFlag.GIVEN_UP, RowFlag.SHARED, RowFlag.NOT_ENDED
HOST_FLAGS = {flag: FLAGS[flag] for flag in _OF_HOST}
"""Those that a host span shows."""
_OF_GPU = RowFlag.WARMUP, RowFlag.CLAMPED, RowFlag.TRIMMED, RowFlag.IN_GRAPH, RowFlag.UNPLACED, RowFlag.SHARED
GPU_FLAGS = {flag: FLAGS[flag] for flag in _OF_GPU}
"""Those that a GPU span shows."""

HOST_MEASURED = (HOST_DURATION, GPU_DURATION, LAUNCH_TO_START)
"""The host span's doubles. It has the last two only where the stage has a GPU part."""
GPU_MEASURED = (GPU_DURATION, LAUNCH_TO_START, CLOCK_UNCERTAINTY)
"""The GPU span's doubles."""
GPU_SAMPLED = (GPU_HAD_WORK, GPU_SAMPLES)
"""What follows them where there were samples: a double and a whole number."""

_OF_BATCHES = BATCH_SIZE, BATCH_POSITION, BATCH_WAIT, BATCH_BASIS, GPU_SHARE
OURS = frozenset((STAGE, GRAPH, *HOST_FLAGS.values(), *HOST_MEASURED, *_OF_BATCHES))
"""Attributes of the host span that the application cannot replace. For any other name its own value is shown."""
