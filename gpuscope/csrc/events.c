/*
 * The common path of `CudaDevice`: an event of a pool recorded on the current stream, by the driver's own function.
 * The twins are `begin` and `end` in `CudaDevice._fast_paths` of `_cuda/cuda_device.py`.
 *
 * Keeps the GIL during the call, as `_cuda/driver.py` explains. Any answer but success, and whatever is not common,
 * goes to the slow path in Python.
 */
#include "sharing.h"
#include "watch.h"

typedef int (*record_function)(void *event, void *stream);
typedef int (*capturing_function)(void *stream, int *status);

/* `EventRecorder(function, is_capturing, streams, current_device, current_stream, begin_slowly, end_slowly, share_ns)` */
typedef struct {
    PyObject_HEAD
    record_function record;
    capturing_function is_capturing;
    PyObject *streams, *current_device, *current_stream, *begin_slowly, *end_slowly;
    long long share_ns, least_ns, least_since_ns; /* See `window_ns`. */
    int since;
} EventRecorder;

static PyObject *str_cuda_stream, *str_device_index, *zero;

/* The newest pair of the pool, or null. A list that shrinks by one needs no new memory. */
static PyObject *take_pair(const TimedStream *timed_stream) {
    PyObject *pairs = timed_stream->pairs;
    Py_ssize_t size = pairs != NULL && PyList_CheckExact(pairs) ? PyList_GET_SIZE(pairs) : 0;
    if (size == 0) return NULL;
    Py_SET_SIZE(pairs, size - 1);
    PyObject *pair = PyList_GET_ITEM(pairs, size - 1);
    if (Py_IS_TYPE(pair, pair_type)) ((EventPair *)pair)->users = 1;
    return pair;
}

static int return_pair(const TimedStream *timed_stream, PyObject *pair) {
    return timed_stream->pairs == NULL || PyList_Append(timed_stream->pairs, pair) ? -1 : 0;
}

/*
 * The `TimedStream` of a device's stream, borrowed. Null without an exception if the slow path has to open it; null
 * with one if looking it up failed.
 */
static TimedStream *find_stream(EventRecorder *self, PyObject *device, PyObject *raw) {
    Py_ssize_t index = PyLong_AsSsize_t(device);
    if (index < 0 || index >= PyList_GET_SIZE(self->streams)) return NULL;
    PyObject *table = PyList_GET_ITEM(self->streams, index);
    PyObject *timed_stream = PyDict_Check(table) ? PyDict_GetItemWithError(table, raw) : NULL;
    if (timed_stream == NULL || !PyObject_TypeCheck(timed_stream, timed_stream_type)) return NULL;
    return (TimedStream *)timed_stream;
}

static TimedStream *stream_now(EventRecorder *self) {
    PyObject *device = PyList_GET_SIZE(self->streams) == 1 ? Py_NewRef(zero) : PyObject_CallNoArgs(self->current_device);
    PyObject *raw = device == NULL ? NULL : PyObject_CallOneArg(self->current_stream, device);
    TimedStream *timed_stream = raw == NULL ? NULL : find_stream(self, device, raw);
    Py_XDECREF(device);
    Py_XDECREF(raw);
    return timed_stream;
}

/* The same for a stream that was given. Null for a default stream, whose handle means that of the current context. */
static TimedStream *stream_of(EventRecorder *self, PyObject *stream) {
    PyObject *device = PyObject_GetAttr(stream, str_device_index), *raw = PyObject_GetAttr(stream, str_cuda_stream);
    TimedStream *timed_stream = device == NULL || raw == NULL ? NULL : find_stream(self, device, raw);
    Py_XDECREF(device);
    Py_XDECREF(raw);
    return timed_stream != NULL && timed_stream->raw ? timed_stream : NULL;
}

enum { FEW_HUNDRED = 256 };

/*
 * The time in which nothing can be enqueued. Recording an event is about the least that there is, so what it took here is
 * the measure: two thirds of the least of the last hundreds, because waiting for an event of another stream may take a
 * little less; within `share_ns` and twice that.
 */
static long long window_ns(const EventRecorder *self) {
    long long window = self->least_ns * 2 / 3, most = 2 * self->share_ns;
    return window < self->share_ns ? self->share_ns : window > most ? most : window;
}

static int record_event(EventRecorder *self, void *event, const TimedStream *timed_stream) {
    long long began_ns = sharing_now_ns();
    int code = self->record(event, (void *)(uintptr_t)timed_stream->raw);
    long long took_ns = sharing_now_ns() - began_ns;
    if (took_ns < self->least_ns) self->least_ns = took_ns;
    if (self->since == 0 || took_ns < self->least_since_ns) self->least_since_ns = took_ns;
    if (++self->since == FEW_HUNDRED) {
        self->least_ns = self->least_since_ns;
        self->since = 0;
    }
    return code;
}

/* Whether nothing can have been enqueued on the stream since its newest event: see `sharing.h`. */
static int is_unchanged(const EventRecorder *self, const TimedStream *timed_stream, const StageRecord *record) {
    return self->share_ns > 0 && timed_stream->last_pair != NULL && timed_stream->left_ns && !timed_stream->foreign &&
           record->called_ns - timed_stream->left_ns < window_ns(self) &&
           record->called_ns - timed_stream->recorded_ns < OLDEST * window_ns(self) &&
           record->called_ns - timed_stream->changed_ns > QUIET_NS &&
           timed_stream->last_thread == PyThread_get_thread_ident();
}

/* Makes the stream's newest event one of the record's own: of its start or its end. */
static void share(TimedStream *timed_stream, StageRecord *record, PyObject **from, void **event) {
    ((EventPair *)timed_stream->last_pair)->users++;
    put(from, Py_NewRef(timed_stream->last_pair));
    *event = timed_stream->last_event;
    record->is_timed = 1;
}

static void note_event(TimedStream *timed_stream, StageRecord *record, PyObject *pair, void *event) {
    unsigned long thread = PyThread_get_thread_ident();
    if (timed_stream->last_thread != thread) {
        if (timed_stream->last_thread) timed_stream->changed_ns = record->called_ns;
        timed_stream->last_thread = thread;
    }
    timed_stream->left_ns = 0;
    timed_stream->recorded_ns = record->called_ns;
    timed_stream->last_event = event;
    if (timed_stream->last_pair != pair) {
        forget_last(timed_stream);
        if (!Py_IS_TYPE(pair, pair_type) || timed_stream->is_over) return;
        ((EventPair *)pair)->users++;
        timed_stream->last_pair = Py_NewRef(pair);
    }
    record->is_timed = 1;
}

/* 1: done; 0: a case for the slow path; -1: an exception. */
static int begin_fast(EventRecorder *self, StageRecord *record, PyObject *stream) {
    TimedStream *timed_stream = stream == Py_None ? stream_now(self) : stream_of(self, stream);
    if (timed_stream == NULL) return PyErr_Occurred() ? -1 : 0;
    PyObject *pair = timed_stream->guarded ? NULL : take_pair(timed_stream);
    if (pair == NULL) {
        forget_last(timed_stream);
        return 0;
    }
    if (is_unchanged(self, timed_stream, record)) {
        share(timed_stream, record, &record->start_from, &record->start_event);
    } else if (record_event(self, event_of(pair, START_ADDRESS), timed_stream)) {
        int failed = return_pair(timed_stream, pair);
        Py_DECREF(pair);
        forget_last(timed_stream);
        return failed;
    } else {
        note_event(timed_stream, record, pair, event_of(pair, START_ADDRESS));
    }
    put(&record->timed_stream, Py_NewRef((PyObject *)timed_stream));
    put(&record->pair, pair);
    return 1;
}

static int check(PyObject *record) {
    if (PyObject_TypeCheck(record, record_type)) return 0;
    PyErr_Format(PyExc_TypeError, "expected a StageRecord, got %R", record);
    return -1;
}

/* The garbage collector takes apart what it collects. */
static int check_whole(const EventRecorder *self) {
    if (self->streams && self->current_device && self->current_stream && self->begin_slowly && self->end_slowly) return 0;
    PyErr_SetString(PyExc_RuntimeError, "the EventRecorder was collected");
    return -1;
}

static PyObject *begin(EventRecorder *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "begin takes a record and a stream");
        return NULL;
    }
    if (check(args[0]) || check_whole(self)) return NULL;
    StageRecord *record = (StageRecord *)args[0];
    if (record->called_ns == 0) note_call(record); /* It did not come by `begin_stage`. */
    int done = begin_fast(self, record, args[1]);
    if (done < 0) return NULL;
    PyObject *answer = done ? Py_NewRef(Py_None) : PyObject_Vectorcall(self->begin_slowly, args, 2, NULL);
    PyObject *stream = answer != NULL && is_present(record->pair) ? record->timed_stream : NULL;
    if (stream != NULL && PyObject_TypeCheck(stream, timed_stream_type)) count_open(record, (TimedStream *)stream);
    return answer;
}

/* Asked here, because the stream may be gone when the collector comes; also true where it can't be told. */
static int is_captured(const EventRecorder *self, const TimedStream *timed_stream) {
    int status = 0;
    return timed_stream->foreign && (self->is_capturing((void *)(uintptr_t)timed_stream->raw, &status) || status);
}

static PyObject *end(EventRecorder *self, PyObject *argument) {
    if (check(argument) || check_whole(self)) return NULL;
    StageRecord *record = (StageRecord *)argument;
    count_left(record);
    if (record->timed_stream == NULL || record->pair == NULL) {
        PyErr_SetString(PyExc_TypeError, "the record has no stream or no pair");
        return NULL;
    }
    if (PyObject_TypeCheck(record->timed_stream, timed_stream_type)) {
        TimedStream *timed_stream = (TimedStream *)record->timed_stream;
        void *event = event_of(record->pair, END_ADDRESS);
        if (!timed_stream->guarded && is_unchanged(self, timed_stream, record)) {
            share(timed_stream, record, &record->end_from, &record->end_event);
            Py_RETURN_NONE;
        }
        if (!timed_stream->guarded && !is_captured(self, timed_stream) && !record_event(self, event, timed_stream)) {
            note_event(timed_stream, record, record->pair, event);
            Py_RETURN_NONE;
        }
        forget_last(timed_stream);
    }
    return PyObject_CallOneArg(self->end_slowly, argument);
}

static PyObject *create(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *function, *is_capturing, *streams, *device, *stream, *begin_slowly, *end_slowly;
    long long share_ns;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "EventRecorder takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(
            args, "O!O!O!OOOOL:EventRecorder", &PyLong_Type, &function, &PyLong_Type, &is_capturing, &PyList_Type,
            &streams, &device, &stream, &begin_slowly, &end_slowly, &share_ns
        ))
        return NULL;
    void *pointer = PyLong_AsVoidPtr(function), *asks = PyLong_AsVoidPtr(is_capturing);
    if (pointer == NULL || asks == NULL) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "the function's address is null");
        return NULL;
    }
    EventRecorder *self = (EventRecorder *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    self->record = (record_function)pointer;
    self->is_capturing = (capturing_function)asks;
    self->streams = Py_NewRef(streams);
    self->current_device = Py_NewRef(device);
    self->current_stream = Py_NewRef(stream);
    self->begin_slowly = Py_NewRef(begin_slowly);
    self->end_slowly = Py_NewRef(end_slowly);
    self->share_ns = self->least_ns = share_ns;
    return (PyObject *)self;
}

static int traverse(EventRecorder *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->streams);
    Py_VISIT(self->current_device);
    Py_VISIT(self->current_stream);
    Py_VISIT(self->begin_slowly);
    Py_VISIT(self->end_slowly);
    return 0;
}

static int clear(EventRecorder *self) {
    Py_CLEAR(self->streams);
    Py_CLEAR(self->current_device);
    Py_CLEAR(self->current_stream);
    Py_CLEAR(self->begin_slowly);
    Py_CLEAR(self->end_slowly);
    return 0;
}

static void dealloc(EventRecorder *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"begin", (PyCFunction)(void (*)(void))begin, METH_FASTCALL, "Record the start event."},
    {"end", (PyCFunction)end, METH_O, "Record the end event."},
    {NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Records events on the current stream."},
    {Py_tp_new, create},
    {Py_tp_methods, methods},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_dealloc, dealloc},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "gpuscope._native.EventRecorder",
    .basicsize = sizeof(EventRecorder),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

int add_events(PyObject *module) {
    str_cuda_stream = PyUnicode_InternFromString("cuda_stream");
    str_device_index = PyUnicode_InternFromString("device_index");
    zero = PyLong_FromLong(0);
    if (!str_cuda_stream || !str_device_index || !zero) return -1;
    return add_type(module, &spec, NULL);
}
