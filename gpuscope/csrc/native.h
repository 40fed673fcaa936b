/*
 * What the files of `gpuscope._native` share: the record of a stage, and the functions between them.
 *
 * Everything here has a twin in Python that says at more length what it does, and is used where this was not built. The
 * twins are in `_data/record.py`, `_data/interfaces.py`, `_data/row.py`, `_recording/hot_path.py`,
 * `_recording/current_stage.py`, `_recording/block.py`, `_recording/state.py`, `_recording/stage.py`,
 * `_recording/wrap.py`, `_recording/batches/token.py`, `_cuda/driver.py`, `_cuda/cuda_device.py`, `_cuda/anchors.py`, `_cuda/clock.py`,
 * `_cuda/graphs/resolve.py`, `_flight/ring.py`, `_collecting/resolve.py`, `_collecting/batch_builder.py` and
 * `exporters/_encoding/otlp_bytes.py`. The common path is here; rare cases are handed back to the Python functions that
 * `prepare` was given.
 */
#ifndef GPUSCOPE_NATIVE_H
#define GPUSCOPE_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <string.h>

typedef struct Watch Watch;

/* One run of a stage: `StageRecord` of `_data/record.py`. A null object is None where it may be absent. */
typedef struct {
    PyObject_HEAD
    PyObject *attributes, *before, *error, *members, *timed_stream, *outer, *pair, *range, *context_before, *span;
    PyObject *recorder, *site, *thread, *trace;
    long long start_ns, end_ns;
    unsigned long long span_id;
    /* The address of the context that it has been made current in and not been taken out of, or 0. */
    unsigned long long place;
    /* Of `sharing.h`: the pairs of other stages whose events are its start and its end, and these events. */
    PyObject *start_from, *end_from;
    void *start_event, *end_event;
    /* When `begin` or `end` was called last, and whether an event was recorded or shared in that. */
    long long called_ns;
    char is_timed;
    struct Watch *watch; /* Of `watch.h`: the stream that it is open on, where that is asked about. */
    unsigned long long flight; /* Of `flight.h`: its slot there and 1, while it runs. */
} StageRecord;

/* What a stage and those inside it share: `Trace` of `_data/record.py`. Refers to nothing that could refer to it. */
typedef struct {
    PyObject_HEAD
    PyObject *root, *sampled, *state;
    unsigned long long high, low, parent_id;
    char remote;
} Trace;

/* What recording needs: `RecorderFields` of `_data/interfaces.py`. */
typedef struct {
    PyObject_HEAD
    PyObject *bridge, *capacity, *clock, *current_context, *device, *flight, *ledger, *look_for_provider, *nvtx, *queue;
    PyObject *random_bits, *span_ids, *waiting;
    /* Of `ids.c`: drawn from `random_bits` and `span_ids` with the first stage. */
    unsigned long long random[4], last_span_id;
    char paused;
} Recorder;

/* A stream of a device: `TimedStreamFields` of `_data/record.py`. */
typedef struct {
    PyObject_HEAD
    PyObject *context, *handle, *pairs;
    unsigned long long raw;
    Py_ssize_t index;
    char foreign, guarded;
    /* Of `sharing.h`: the newest event and its pair, the thread that recorded it and when, when that thread last left
       `begin` or `end`, and when a thread last recorded after another one. */
    PyObject *last_pair;
    void *last_event;
    unsigned long last_thread;
    long long recorded_ns, left_ns, changed_ns;
    char is_over; /* Its period of recording: the newest event is held no longer. */
    struct Watch *watch; /* Of `watch.h`, where it is asked about. */
} TimedStream;

/* Two events, and how many hold them: stages whose start or end is one of them, and a stream whose newest is. */
typedef struct {
    PyObject_HEAD
    PyObject *parts[4];
    void *events[2];
    int users;
} EventPair;

/* A `with stage(...)` block: `StageBlock` of `_recording/block.py`. */
typedef struct {
    StageRecord record;
    PyObject *owner, *stream;
    char uses;
} StageBlock;

/* What a token holds: `TokenFields` of `_recording/batches/token.py`. Never changed once it is made. */
typedef struct {
    PyObject_HEAD
    PyObject *source;
    long long time_ns;
} Token;

extern PyTypeObject *fields_type;
extern PyTypeObject *record_type, *recorder_type, *trace_type, *timed_stream_type, *block_type, *pair_type;

static inline int is_present(const PyObject *object) { return object != NULL && object != Py_None; }

static inline void put(PyObject **slot, PyObject *owned) {
    PyObject *old = *slot;
    *slot = owned;
    Py_XDECREF(old);
}

/* How many records ahead memory is fetched: those of a second are in no cache any more. */
enum { AHEAD = 8 };
#ifdef __GNUC__
#define FETCH(address) __builtin_prefetch(address)
#else
#define FETCH(address) ((void)(address))
#endif

/* Pairs are `(start, end, start's address, end's address)`. */
enum { START_ADDRESS = 2, END_ADDRESS = 3 };

/* Null, which the driver refuses, for what is not a pair of addresses. */
static inline void *event_of(PyObject *pair, Py_ssize_t which) {
    if (pair != NULL && Py_IS_TYPE(pair, pair_type)) return ((EventPair *)pair)->events[which - START_ADDRESS];
    PyObject *address = pair != NULL && PyTuple_CheckExact(pair) && PyTuple_GET_SIZE(pair) == 4
                            ? PyTuple_GET_ITEM(pair, which)
                            : NULL;
    void *event = address != NULL && PyLong_Check(address) ? PyLong_AsVoidPtr(address) : NULL;
    if (event == NULL && PyErr_Occurred()) PyErr_Clear();
    return event;
}

/* A block of the given type, which is a subtype of `block_type`, ready to be entered. */
PyObject *make_block(PyTypeObject *type, PyObject *recorder, PyObject *site);

/* Null and an exception for what is not a recorder. */
Recorder *as_recorder(PyObject *object);

/* Each holds `recorder` itself, and fails only with what is not an `Exception`. */
int begin_stage(Recorder *recorder, StageRecord *record, PyObject *site, PyObject *stream, PyObject *suspends);
int end_stage(StageRecord *record, PyObject *error);

/* The stage of this recorder that is current, as a new reference, or None; and the time by the recorder's clock. */
int stage_here(Recorder *recorder, PyObject **stage);
int read_now(Recorder *recorder, long long *now_ns);

/* A new trace with this stage as its root, and a span id that no other stage has. */
int new_trace(Recorder *recorder, StageRecord *record);
int next_span_id(Recorder *recorder, StageRecord *record);
int split_trace_id(PyObject *id, unsigned long long *high, unsigned long long *low);

/* What the driver says of a pair, and the terms of a `GpuClock` (`_cuda/clock.py`). */
typedef struct {
    void *start, *end;
    float duration_ms, end_ms;
} Distance;

typedef struct {
    long long host_ns, half_ns;
    double host_ns_per_ms, doubt_ns_per_ms;
    long long event_cost_ns;
} Clock;

/* What rows may be flagged with. */
typedef struct {
    int clamped, trimmed;
} PlaceFlags;

/* To be freed by `PyMem_Free`. Null and an exception for what is not a list of records. */
Distance *distances_of(PyObject *records, Py_ssize_t count);

/* Rows of the first so many records, whose pairs go back to the pool. */
PyObject *rows_of(PyObject *records, const Distance *all, Py_ssize_t count, const Clock *clock, PlaceFlags flags);

/* Gives the record's events back to the pool, those that no other stage needs; -1 and an exception on failure. */
int give_back(StageRecord *record);

/* Forgets the newest event of a stream, so that nothing shares it. */
void forget_last(TimedStream *timed_stream);

/* Asks no more about a stream that is about to be freed. */
void release_watch(TimedStream *timed_stream);

/* Each adds its types and functions to the module; -1 and an exception on failure. */
/* Makes a type, adds it to the module, and hands it out unless `type` is null. */
int add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **type);

int add_record(PyObject *module);
int add_recording(PyObject *module);
int add_block(PyObject *module);
int add_calls(PyObject *module);
int add_events(PyObject *module);
int add_pairs(PyObject *module);
int add_place(PyObject *module);
int add_pack(PyObject *module);
int add_join(PyObject *module);
int add_requests(PyObject *module);
int add_reader(PyObject *module);
int add_graphs(PyObject *module);
int add_sampler(PyObject *module);
int add_token(PyObject *module);
int add_summed(PyObject *module);
int add_flight(PyObject *module);
int add_stall(PyObject *module);

#endif
