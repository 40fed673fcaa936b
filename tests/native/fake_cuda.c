/*
 * A CUDA driver for tests of `CudaDevice` and of the parts in C on machines without one. Work on a stream takes no time,
 * unless it is held up.
 *
 * Events remember when they were recorded. `fake_answer` sets what the next calls of `cuEventRecord` answer,
 * `fake_capture` says which stream is being captured, and `fake_hold` holds the GPU up, until `fake_work` has it do so
 * many pieces of work. Graphs consist of kernels, `fake_kernel`, that take 50 µs each, and of nodes that record events.
 *
 * Where CUDA forbids something this counts it: `fake_overlaps` says how often a thread touched an executable graph while
 * another was inside a call about it, `fake_crashes` how often a stream was used or asked about after it was destroyed,
 * `fake_breaks` how often a stream was asked for work during a capture that this breaks, or by a thread that must not.
 */
#define _GNU_SOURCE /* Recursive mutexes. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS, INVALID_VALUE, INVALID_HANDLE = 400, NOT_READY = 600, MOST = 4096, MOST_NODES = 256, KERNEL_NS = 50000 };

typedef struct {
    long long recorded_ns;
    int captured, awaited;
} Event;

typedef struct Node {
    Event *event; /* NULL: a kernel. */
    int destroyed, waits;
    struct Node *waits_for[4];
} Node;

typedef struct {
    int count;
    Node *nodes[MOST_NODES];
    Event *events[MOST_NODES];
    atomic_int inside; /* Threads in calls about it. */
} Graph;

typedef enum { NOW, FIRST_NODE, LATER_NODE } Place;

typedef struct {
    Event *event;
    int awaited;
    Place place;
} Work;

static int answer, answers_left, contexts_pushed, held, exchanges, exchange_answer, capture_id;
static void *volatile captured_stream;
static long long records, last_node_ns;
static Graph *captured_graph;
static Node *position[4]; /* What the next node of the capture waits for. */
static int positions;
static Work work[MOST];
static int first_work, last_work;

static long long now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void do_one(void) {
    Work *one = &work[first_work++ % MOST];
    if (one->place != LATER_NODE) last_node_ns = now_ns();
    if (one->event == NULL) last_node_ns += KERNEL_NS;
    while (now_ns() < last_node_ns) continue;
    if (one->event == NULL) return;
    one->event->recorded_ns = last_node_ns;
    one->event->awaited -= one->awaited;
}

/* A launch runs without the GIL, and other threads record meanwhile. */
static pthread_mutex_t queue = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static atomic_int overlaps;

int fake_overlaps(void) { return overlaps; }

static void enter(Graph *graph) {
    if (atomic_fetch_add(&graph->inside, 1)) overlaps++;
}
static void leave(Graph *graph) { atomic_fetch_sub(&graph->inside, 1); }

static void enqueue(Event *event, int awaited, Place place) {
    pthread_mutex_lock(&queue);
    if (event != NULL) event->awaited += awaited;
    work[last_work++ % MOST] = (Work){event, awaited, place};
    if (!held) do_one();
    pthread_mutex_unlock(&queue);
}

void fake_answer(int code, int calls) { answer = code, answers_left = calls; }
void fake_capture(void *stream) { captured_stream = stream; }
void fake_hold(void) { held = 1; }
void fake_work(int pieces) {
    pthread_mutex_lock(&queue);
    while (first_work < last_work && pieces-- > 0) do_one();
    held = first_work < last_work;
    pthread_mutex_unlock(&queue);
}
long long fake_records(void) { return records; }
int fake_contexts_pushed(void) { return contexts_pushed; }
int fake_exchanges(void) { return exchanges; }
void fake_refuse_exchanges(int code) { exchange_answer = code; }

/* Streams of other libraries: the address of one that is destroyed is used again for the next. */
enum { FIRST_STREAM = 0x10000, MOST_STREAMS = 8192 };
static volatile char is_gone[MOST_STREAMS];
static int streams;
static atomic_int crashes;

int fake_new_stream(void) {
    for (int i = 0; i < streams; i++)
        if (is_gone[i] == 2) return is_gone[i] = 0, FIRST_STREAM + 16 * i;
    return FIRST_STREAM + 16 * streams++;
}
/* With `again` its address is used again for the next. */
void fake_destroy_stream(long stream, int again) { is_gone[(stream - FIRST_STREAM) / 16] = again ? 2 : 1; }
int fake_crashes(void) {
    int found = crashes;
    crashes = 0;
    return found;
}
static int crashed(void *stream) {
    long i = ((long)stream - FIRST_STREAM) / 16;
    int gone = (long)stream >= FIRST_STREAM && i < streams && is_gone[i];
    crashes += gone;
    return gone;
}

static const char *refused; /* The call about nodes of a capture that is answered with an error. */
void fake_refuse(const char *call) { refused = call == NULL ? NULL : strdup(call); }
static int refuses(const char *call) { return refused != NULL && strcmp(call, refused) == 0; }

void fake_begin_capture(void *stream) {
    captured_stream = stream;
    captured_graph = calloc(1, sizeof(Graph));
    capture_id++;
    positions = 0;
}

static void add_node(Event *event) {
    Node *node = calloc(1, sizeof(Node));
    node->event = event;
    node->waits = positions;
    memcpy(node->waits_for, position, sizeof position);
    captured_graph->nodes[captured_graph->count++] = node;
    positions = 1, position[0] = node;
}

void fake_kernel(void) { add_node(NULL); }

/* How many nodes of a graph are kernels (0) or records (1) that wait for a kernel (0) or a record (1). */
int fake_waits(Graph *graph, int records, int for_records) {
    int found = 0;
    for (int i = 0; i < graph->count; i++)
        for (int j = 0; j < graph->nodes[i]->waits; j++)
            found += (graph->nodes[i]->event != NULL) == records &&
                     (graph->nodes[i]->waits_for[j]->event != NULL) == for_records;
    return found;
}

Graph *fake_end_capture(void) {
    Graph *graph = captured_graph;
    captured_stream = captured_graph = NULL;
    return graph;
}

Graph *fake_instantiate(Graph *graph) {
    Graph *executable = calloc(1, sizeof(Graph));
    memcpy(executable, graph, sizeof *graph);
    for (int i = 0; i < graph->count; i++) executable->events[i] = graph->nodes[i]->event;
    return executable;
}

void fake_destroy_graph(Graph *graph) {
    for (int i = 0; i < graph->count; i++) graph->nodes[i]->destroyed = 1;
}

/* A node's event does not wait for its record, as one of a stream does: asked about before, it tells of the record before. */
void fake_launch(Graph *executable) {
    enter(executable);
    pthread_mutex_lock(&queue); /* Its nodes follow each other, whatever else is recorded. */
    for (int i = 0; i < executable->count; i++) enqueue(executable->events[i], 0, i ? LATER_NODE : FIRST_NODE);
    pthread_mutex_unlock(&queue);
    leave(executable);
}

void fake_destroy_executable(Graph *executable) {
    enter(executable);
    leave(executable);
}

#define ANCHORS ((void *)0x5000)
static long long anchor_delay_ns; /* As on a GPU with one connection: an event waits for work of other streams. */
void fake_delay_anchors(long long ns) { anchor_delay_ns = ns; }

static int record_held_ns; /* As while a copy from pageable memory holds the driver's lock. */
static int records_held;
void fake_hold_records(int ns) { record_held_ns = ns, records_held = ns ? 1 << 30 : 0; }
void fake_hold_one_record(int ns) { record_held_ns = ns, records_held = 1; }

static int events_left = -1; /* Then the driver is out of memory. */
void fake_make_events(int count) { events_left = count; }

static int events_made, streams_made;
int fake_events_made(void) { return events_made; }
int fake_streams_made(void) { return streams_made; }

int cuEventCreate(void **event, unsigned flags) {
    if (events_left == 0) return 2;
    events_made++;
    events_left -= events_left > 0;
    *event = calloc(1, sizeof(Event));
    return SUCCESS;
}

int cuEventRecord(Event *event, void *stream) {
    records++;
    if (crashed(stream)) return INVALID_HANDLE;
    if (answers_left > 0) {
        answers_left--;
        return answer;
    }
    if (event == NULL) return INVALID_HANDLE;
    event->captured = captured_stream != NULL && stream == captured_stream;
    if (stream == ANCHORS && records_held > 0) {
        records_held--;
        const struct timespec held_for = {0, record_held_ns};
        nanosleep(&held_for, NULL);
    }
    if (stream == ANCHORS && anchor_delay_ns) return event->recorded_ns = now_ns() + anchor_delay_ns, SUCCESS;
    if (!event->captured) enqueue(event, 1, NOW);
    return SUCCESS;
}

int cuEventRecordWithFlags(Event *event, void *stream, unsigned flags) {
    if (flags != 1 || stream != captured_stream || refuses("cuEventRecordWithFlags")) return INVALID_VALUE;
    add_node(event);
    return SUCCESS;
}

int cuStreamUpdateCaptureDependencies(void *stream, Node **nodes, size_t count, unsigned flags) {
    if (flags != 1 || stream != captured_stream || count > 4) return INVALID_VALUE;
    if (refuses("cuStreamUpdateCaptureDependencies")) return INVALID_VALUE;
    memcpy(position, nodes, count * sizeof *nodes);
    positions = (int)count;
    return SUCCESS;
}

int cuStreamGetCaptureInfo_v2(
    void *stream, int *status, unsigned long long *id, void **graph, Node ***nodes, size_t *count
) {
    *status = captured_stream != NULL && stream == captured_stream;
    if (crashed(stream)) return INVALID_HANDLE;
    if (!*status) return SUCCESS;
    if (id != NULL) *id = capture_id;
    if (graph != NULL) *graph = captured_graph;
    if (nodes != NULL && refuses("cuStreamGetCaptureInfo_v2")) return INVALID_VALUE;
    if (nodes != NULL) *nodes = position;
    if (count != NULL) *count = (size_t)positions;
    return SUCCESS;
}

int cuGraphExecEventRecordNodeSetEvent(Graph *executable, Node *node, Event *event) {
    int code = INVALID_VALUE;
    exchanges++;
    enter(executable);
    for (int i = 0; i < executable->count; i++)
        if (executable->nodes[i] == node && !node->destroyed) executable->events[i] = event, code = SUCCESS;
    leave(executable);
    return exchange_answer ? exchange_answer : code;
}

static int queries, distances;
int fake_queries(void) { return queries; }
int fake_distances(void) { return distances; }

int cuEventQuery(Event *event) {
    queries++;
    if (event == NULL) return INVALID_HANDLE;
    return event->captured ? INVALID_VALUE : event->awaited || now_ns() < event->recorded_ns ? NOT_READY : SUCCESS;
}

int cuEventElapsedTime(float *ms, Event *start, Event *end) {
    distances++;
    if (start == NULL || end == NULL) return INVALID_HANDLE;
    if (start->captured || end->captured) return INVALID_VALUE;
    if (start->awaited || end->awaited) return NOT_READY;
    *ms = (float)((double)(end->recorded_ns - start->recorded_ns) / 1e6);
    return SUCCESS;
}

static atomic_int questions;
static volatile int stream_delay_ns;
int fake_questions(void) { return questions; }
void fake_delay_streams(int ns) { stream_delay_ns = ns; }
static void answer_late(void) {
    const struct timespec delay = {0, stream_delay_ns};
    if (stream_delay_ns) nanosleep(&delay, NULL);
}

int cuStreamIsCapturing(void *stream, int *status) {
    questions++;
    if (crashed(stream)) return INVALID_HANDLE;
    *status = captured_stream != NULL && stream == captured_stream;
    answer_late();
    return SUCCESS;
}

/* Whether streams have work, which `fake_load` says of each; `fake_stream_answer` what is answered instead of that. */
enum { MOST_LOADED = 64 };
static void *volatile loaded[MOST_LOADED];
static volatile int stream_answer;
static atomic_int stream_queries, breaks;
static _Thread_local int mode;
static _Thread_local void *current_context;
static void *volatile last_context;

void fake_load(void *stream, int has_work) {
    for (int i = 0; i < MOST_LOADED; i++)
        if (loaded[i] == (has_work ? NULL : (char *)stream + 1)) {
            loaded[i] = has_work ? (char *)stream + 1 : NULL; /* The default stream is 0. */
            return;
        }
}
void fake_stream_answer(int code) { stream_answer = code; }
int fake_stream_queries(void) { return stream_queries; }
int fake_breaks(void) { return breaks; }
void *fake_last_context(void) { return last_context; }

int cuStreamQuery(void *stream) {
    stream_queries++;
    last_context = current_context;
    if (crashed(stream)) return INVALID_HANDLE;
    void *captured = captured_stream;
    if (mode != 2 || (captured != NULL && (stream == captured || stream == NULL))) return breaks++, 900;
    answer_late();
    if (stream_answer) return stream_answer;
    for (int i = 0; i < MOST_LOADED; i++)
        if (loaded[i] == (char *)stream + 1) return NOT_READY;
    return SUCCESS;
}

int cuCtxPushCurrent_v2(void *context) { return contexts_pushed++, 0; }
int cuCtxPopCurrent_v2(void **context) { return contexts_pushed--, 0; }
int cuCtxSetCurrent(void *context) { return current_context = context, 0; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, 0; }
int cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    return streams_made++, *stream = ANCHORS, 0;
}
int cuThreadExchangeStreamCaptureMode(int *wanted) {
    int before = mode;
    mode = *wanted;
    return *wanted = before, 0;
}
int cuDeviceGet(int *device, int index) { return *device = index, 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = 0, *active = device < 2, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)(0x1000L + device), 0; }
int cuDeviceGetName(char *name, int size, int device) { return strncpy(name, "Fake GPU", (size_t)size), 0; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { return memset(uuid, device, 16), 0; }
