/*
 * `EventReader`: what the collector asks the driver, without the GIL.
 *
 * The driver may hold its lock for as long as a copy from pageable memory takes. While the collector waits for that
 * lock, no thread of the program may have to wait for the GIL. The twins are `Resolver._collect_stream` of
 * `_collecting/resolve.py`, `ReplayResolver._measure_in_python` of `_cuda/graphs/resolve.py` and `Anchors._bracket` of
 * `_cuda/anchors.py`. `spacing` has none: without the parts in C nobody knows what events take.
 */
#include "native.h"

#include <time.h>

/* `EventReader(set_context, is_capturing, query, elapsed, record)`: the addresses of the driver's functions */
typedef struct {
    PyObject_HEAD
    int (*set_context)(void *context);
    int (*is_capturing)(void *stream, int *status);
    int (*query)(void *event);
    int (*elapsed)(float *milliseconds, void *start, void *end);
    int (*record)(void *event, void *stream);
} EventReader;

enum { INVALID_HANDLE = 400, NOT_READY = 600, CAPTURING = -1, MOST_IN_A_ROW = 64 };
static const long long PATIENCE_NS = 100000, NAP_NS = 20000, LATENCY_NS = 5000;
enum { RECORDS = 3 }; /* Of an anchor, at most. */

static long long now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static int ask(const EventReader *self, void *event) { return event == NULL ? INVALID_HANDLE : self->query(event); }

/*
 * How many of the events, oldest first, are done; `answer` becomes what the driver said of the next one.
 *
 * Work on a stream ends in order, so an event that is done answers for all before it.
 */
static Py_ssize_t count_done(const EventReader *self, const Distance *all, Py_ssize_t count, int *answer) {
    if (count == 0 || (*answer = ask(self, all[count - 1].end)) == 0) return count;
    Py_ssize_t done = 0, next = *answer == NOT_READY ? count - 1 : 0;
    while (done < next) {
        Py_ssize_t middle = done + (next - done) / 2;
        int code = ask(self, all[middle].end);
        if (code == 0) {
            done = middle + 1;
        } else {
            next = middle;
            *answer = code;
        }
    }
    return done;
}

/*
 * How many of the done events can be timed; if not all, `answer` becomes what the driver said of the next one. Without
 * an anchor the durations alone are told.
 */
static Py_ssize_t measure(const EventReader *self, void *anchor, Distance *all, Py_ssize_t done, int *answer) {
    for (Py_ssize_t i = 0; i < done; i++) {
        Distance *one = &all[i];
        int code = one->start ? self->elapsed(&one->duration_ms, one->start, one->end) : INVALID_HANDLE;
        if (code == 0 && anchor != NULL) code = self->elapsed(&one->end_ms, anchor, one->end);
        if (code) {
            *answer = code;
            return i;
        }
    }
    return done;
}

/*
 * Whether events of a stream must not be asked about now. Of a stream that may be gone nothing is asked: whoever
 * recorded on it made sure that it was not being captured.
 */
static int must_wait(const EventReader *self, unsigned long long context, unsigned long long stream, int foreign) {
    int status = 0;
    /* The default stream is that of the current context, and this thread has none by itself. */
    if (self->set_context((void *)(uintptr_t)context)) return 1;
    return !foreign && (self->is_capturing((void *)(uintptr_t)stream, &status) || status);
}

/*
 * read(records, context, stream, foreign, anchor, clamped, trimmed, host_ns, half_ns, host_ns_per_ms, doubt_ns_per_ms,
 *      event_cost_ns)
 *
 * Takes records of one stream, oldest first. Returns what the driver said of the first one that is not done or can't be
 * timed (0 if there is none, -1 if the driver was not asked, during a capture), and the rows of those before it.
 */
static PyObject *read_events(EventReader *self, PyObject *args) {
    PyObject *records;
    unsigned long long context, stream, anchor;
    int foreign, answer = CAPTURING;
    PlaceFlags flags;
    Clock clock;
    if (!PyArg_ParseTuple(
            args, "O!KKpKiiLLddL:read", &PyList_Type, &records, &context, &stream, &foreign, &anchor, &flags.clamped,
            &flags.trimmed, &clock.host_ns, &clock.half_ns, &clock.host_ns_per_ms, &clock.doubt_ns_per_ms, &clock.event_cost_ns
        ))
        return NULL;
    Py_ssize_t count = PyList_GET_SIZE(records), done = 0;
    Distance *all = distances_of(records, count);
    if (all == NULL) return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (!must_wait(self, context, stream, foreign)) {
        answer = 0;
        done = count_done(self, all, count, &answer);
        done = measure(self, (void *)(uintptr_t)anchor, all, done, &answer);
    }
    Py_END_ALLOW_THREADS
    PyObject *rows = rows_of(records, all, done, &clock, flags);
    PyMem_Free(all);
    return rows == NULL ? NULL : Py_BuildValue("iN", answer, rows);
}

/* The distances of one replay: of each node's event to the fence, and of the fence from the anchor. */
static int measure_replay(const EventReader *self, void *anchor, void *const *events, Py_ssize_t count, float *distances) {
    /* Until the fence is done, the nodes' events may be those of an earlier launch. */
    Py_ssize_t fence = count - 1;
    int code = anchor != NULL ? self->elapsed(&distances[fence], anchor, events[fence]) : ask(self, events[fence]);
    if (anchor == NULL) distances[fence] = 0;
    for (Py_ssize_t i = 0; code == 0 && i < fence; i++) {
        /* NaN where it can't be told: only the replay that it belongs to is left out. */
        if (self->elapsed(&distances[i], events[i], events[fence])) distances[i] = Py_NAN;
    }
    return code;
}

typedef struct {
    Py_ssize_t count, distances;
    Py_buffer *buffers;
} Replays;

static void release(Replays *replays) {
    for (Py_ssize_t i = 0; i < replays->count; i++) PyBuffer_Release(&replays->buffers[i]);
    PyMem_Free(replays->buffers);
}

static int read_addresses(PyObject *list, Replays *replays) {
    Py_ssize_t count = PyList_GET_SIZE(list);
    replays->count = replays->distances = 0;
    replays->buffers = PyMem_Calloc(count ? count : 1, sizeof *replays->buffers);
    if (replays->buffers == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (; replays->count < count; replays->count++) {
        Py_buffer *buffer = &replays->buffers[replays->count];
        if (PyObject_GetBuffer(PyList_GET_ITEM(list, replays->count), buffer, PyBUF_SIMPLE)) break;
        Py_ssize_t events = buffer->len / (Py_ssize_t)sizeof(void *);
        if (events == 0) PyErr_SetString(PyExc_ValueError, "a replay must have an event for each node, and a fence");
        replays->distances += events;
    }
    if (!PyErr_Occurred()) return 0;
    release(replays);
    return -1;
}

/* How many are done, oldest first; `answer` becomes what the driver said of the next one. */
static Py_ssize_t measure_replays(const EventReader *self, void *anchor, const Replays *replays, float *distances, int *answer) {
    for (Py_ssize_t i = 0; i < replays->count; i++) {
        void *const *events = replays->buffers[i].buf;
        Py_ssize_t count = replays->buffers[i].len / (Py_ssize_t)sizeof(void *);
        if ((*answer = measure_replay(self, anchor, events, count, distances))) return i;
        distances += count;
    }
    return replays->count;
}

/*
 * read_replays(replays, context, stream, foreign, anchor)
 *
 * Takes replays on one stream, oldest first, each as the addresses of its nodes' events and of its fence. Returns what
 * the driver said of the first one that is not done, as `read` does; how many are done; and their distances, as floats.
 */
static PyObject *read_replays(EventReader *self, PyObject *args) {
    PyObject *list;
    unsigned long long context, stream, anchor;
    int foreign, answer = CAPTURING;
    Replays replays;
    if (!PyArg_ParseTuple(args, "O!KKpK:read_replays", &PyList_Type, &list, &context, &stream, &foreign, &anchor))
        return NULL;
    if (read_addresses(list, &replays)) return NULL;
    PyObject *distances = PyBytes_FromStringAndSize(NULL, replays.distances * (Py_ssize_t)sizeof(float));
    Py_ssize_t done = 0;
    if (distances != NULL) {
        float *to = (float *)PyBytes_AS_STRING(distances);
        Py_BEGIN_ALLOW_THREADS
        if (!must_wait(self, context, stream, foreign))
            done = measure_replays(self, (void *)(uintptr_t)anchor, &replays, to, &answer);
        Py_END_ALLOW_THREADS
    }
    release(&replays);
    return distances == NULL ? NULL : Py_BuildValue("inN", answer, done, distances);
}

/* Returns the driver's code, and the host's clock before and after the event. */
static int record_between(
    const EventReader *self, void *event, void *stream, long long limit_ns, long long *before, long long *after
) {
    long long recorded, asked;
    *before = now_ns();
    int code = self->record(event, stream);
    recorded = asked = now_ns(); /* Much later, where a copy held the driver's lock. */
    if (code == 0) code = self->query(event);
    while (code == NOT_READY) {
        if (*before < asked - LATENCY_NS) *before = asked - LATENCY_NS; /* It was not done then. */
        if (asked - recorded > PATIENCE_NS) {
            const struct timespec nap = {0, NAP_NS};
            nanosleep(&nap, NULL);
        }
        asked = now_ns();
        if (asked - recorded > limit_ns) break;
        code = self->query(event);
    }
    *after = now_ns();
    return code;
}

/* bracket(event, stream, limit_ns): the host's clock before and after the event; None if it was not done in time. */
static PyObject *bracket(EventReader *self, PyObject *args) {
    unsigned long long event, stream;
    long long limit_ns, before, after;
    int code = NOT_READY;
    if (!PyArg_ParseTuple(args, "KKL:bracket", &event, &stream, &limit_ns)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    /* One that had to wait for the driver's lock may be followed by one that has not, before the next copy begins. */
    for (int i = 0; i < RECORDS; i++) {
        code = record_between(self, (void *)(uintptr_t)event, (void *)(uintptr_t)stream, limit_ns, &before, &after);
        if (code || after - before <= PATIENCE_NS) break;
    }
    Py_END_ALLOW_THREADS
    if (code) Py_RETURN_NONE;
    return Py_BuildValue("LL", before, after);
}

/* How far the events of a row are apart, in ascending order; how many there are, or -1 if they were not done in time. */
static int measure_spacing(
    const EventReader *self, void *const *events, int count, void *stream, long long limit_ns, float *ms, long long *took_ns
) {
    const struct timespec nap = {0, NAP_NS};
    int code = 0;
    long long began = now_ns();
    for (int i = 0; i < count && code == 0; i++) code = self->record(events[i], stream);
    *took_ns = now_ns() - began;
    long long until = began + limit_ns;
    if (code == 0) code = self->query(events[count - 1]);
    while (code == NOT_READY && now_ns() < until) {
        nanosleep(&nap, NULL);
        code = self->query(events[count - 1]);
    }
    for (int i = 1; i < count && code == 0; i++) {
        float apart;
        code = self->elapsed(&apart, events[i - 1], events[i]);
        int at = i - 1;
        for (; at > 0 && ms[at - 1] > apart; at--) ms[at] = ms[at - 1];
        ms[at] = apart;
    }
    return code ? -1 : count - 1;
}

/*
 * spacing(events, stream, limit_ns)
 *
 * Records events in a row, as fast as that goes. Returns how long recording one took on the host, in nanoseconds, and
 * how far neighbours are apart on the GPU, in milliseconds and in ascending order; None if they were not done in time.
 */
static PyObject *spacing(EventReader *self, PyObject *args) {
    Py_buffer addresses;
    unsigned long long stream;
    long long limit_ns, took = 0;
    float ms[MOST_IN_A_ROW];
    int found = -1;
    if (!PyArg_ParseTuple(args, "y*KL:spacing", &addresses, &stream, &limit_ns)) return NULL;
    int count = (int)(addresses.len / (Py_ssize_t)sizeof(void *));
    if (count < 2 || count > MOST_IN_A_ROW || addresses.len % (Py_ssize_t)sizeof(void *)) {
        PyBuffer_Release(&addresses);
        return PyErr_Format(PyExc_ValueError, "expected the addresses of 2 to %d events", MOST_IN_A_ROW);
    }
    Py_BEGIN_ALLOW_THREADS
    found = measure_spacing(self, addresses.buf, count, (void *)(uintptr_t)stream, limit_ns, ms, &took);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&addresses);
    if (found < 0) Py_RETURN_NONE;
    PyObject *apart = PyTuple_New(found);
    for (int i = 0; apart != NULL && i < found; i++) {
        PyObject *one = PyFloat_FromDouble(ms[i]);
        if (one == NULL) Py_CLEAR(apart);
        else PyTuple_SET_ITEM(apart, i, one);
    }
    return apart == NULL ? NULL : Py_BuildValue("dN", (double)took / count, apart);
}

static PyObject *create(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    unsigned long long set_context, is_capturing, query, elapsed, record;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "EventReader takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "KKKKK:EventReader", &set_context, &is_capturing, &query, &elapsed, &record))
        return NULL;
    if (!set_context || !is_capturing || !query || !elapsed || !record) {
        PyErr_SetString(PyExc_ValueError, "the address of a function is null");
        return NULL;
    }
    EventReader *self = (EventReader *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    self->set_context = (int (*)(void *))(uintptr_t)set_context;
    self->is_capturing = (int (*)(void *, int *))(uintptr_t)is_capturing;
    self->query = (int (*)(void *))(uintptr_t)query;
    self->elapsed = (int (*)(float *, void *, void *))(uintptr_t)elapsed;
    self->record = (int (*)(void *, void *))(uintptr_t)record;
    return (PyObject *)self;
}

static PyMethodDef methods[] = {
    {"read", (PyCFunction)read_events, METH_VARARGS, "Return what is said of the first stage that is not done, and rows."},
    {"read_replays", (PyCFunction)read_replays, METH_VARARGS, "Return what is said of the first replay that is not done."},
    {"bracket", (PyCFunction)bracket, METH_VARARGS, "Record an event between two readings of the host's clock."},
    {"spacing", (PyCFunction)spacing, METH_VARARGS, "Record events in a row, and return how far they are apart."},
    {NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Asks the driver about events, without the GIL."},
    {Py_tp_new, create},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "gpuscope._native.EventReader",
    .basicsize = sizeof(EventReader),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

int add_reader(PyObject *module) {
    return add_type(module, &spec, NULL);
}
