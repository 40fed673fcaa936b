/*
 * The common path of `CudaDevice`: an event of a pool recorded on the current stream, by the driver's own function.
 *
 * Keeps the GIL during the call, as `_cuda.py` explains. Any answer but success, and whatever is not common, goes to the
 * slow path in Python.
 */
#include "native.h"

typedef int (*record_function)(void *event, void *stream);

/* `EventRecorder(function, lanes, current_device, current_stream, begin_slowly, end_slowly)` */
typedef struct {
    PyObject_HEAD
    record_function record;
    PyObject *lanes, *current_device, *current_stream, *begin_slowly, *end_slowly;
} EventRecorder;

static PyObject *str_cuda_stream, *str_device_index, *str_guarded, *str_pairs, *str_raw, *zero;

static PyObject *take_pair(PyObject *lane) {
    PyObject *pair = NULL, *pairs = PyObject_GetAttr(lane, str_pairs);
    if (pairs == NULL) return NULL;
    Py_ssize_t size = PyList_CheckExact(pairs) ? PyList_GET_SIZE(pairs) : 0;
    if (size > 0) {
        pair = Py_NewRef(PyList_GET_ITEM(pairs, size - 1));
        if (PyList_SetSlice(pairs, size - 1, size, NULL)) Py_CLEAR(pair);
    }
    Py_DECREF(pairs);
    return pair;
}

/* 1: the lane must be asked first; 0: not; -1: an exception. */
static int is_guarded(PyObject *lane) {
    PyObject *guarded = PyObject_GetAttr(lane, str_guarded);
    if (guarded == NULL) return -1;
    int answer = guarded != Py_False;
    Py_DECREF(guarded);
    return answer;
}

/* The lane of a device and stream, or null: with an exception, or without where the slow path has to open it. */
static PyObject *find_lane(EventRecorder *self, PyObject *device, PyObject *raw) {
    Py_ssize_t index = PyLong_AsSsize_t(device);
    if (index < 0 || index >= PyList_GET_SIZE(self->lanes)) return NULL;
    PyObject *table = PyList_GET_ITEM(self->lanes, index);
    return PyDict_Check(table) ? Py_XNewRef(PyDict_GetItemWithError(table, raw)) : NULL;
}

static PyObject *current_lane(EventRecorder *self, void **handle) {
    PyObject *device = PyList_GET_SIZE(self->lanes) == 1 ? Py_NewRef(zero) : PyObject_CallNoArgs(self->current_device);
    PyObject *raw = device == NULL ? NULL : PyObject_CallOneArg(self->current_stream, device);
    PyObject *lane = raw == NULL ? NULL : find_lane(self, device, raw);
    if (lane != NULL) *handle = PyLong_AsVoidPtr(raw);
    Py_XDECREF(device);
    Py_XDECREF(raw);
    return lane;
}

/* The lane of a stream that was given. Not that of a default stream: its handle means one of the current context. */
static PyObject *lane_of(EventRecorder *self, PyObject *stream, void **handle) {
    PyObject *device = PyObject_GetAttr(stream, str_device_index), *raw = PyObject_GetAttr(stream, str_cuda_stream);
    PyObject *lane = device == NULL || raw == NULL ? NULL : find_lane(self, device, raw);
    if (lane != NULL && (*handle = PyLong_AsVoidPtr(raw)) == NULL) Py_CLEAR(lane);
    Py_XDECREF(device);
    Py_XDECREF(raw);
    return lane;
}

/* 1: done; 0: a case for the slow path; -1: an exception. */
static int begin_fast(EventRecorder *self, StageRecord *record, PyObject *stream) {
    void *handle = NULL;
    PyObject *lane = stream == Py_None ? current_lane(self, &handle) : lane_of(self, stream, &handle), *pair = NULL;
    int done = 0;
    if (lane != NULL) {
        int guarded = is_guarded(lane);
        if (guarded == 0) pair = take_pair(lane);
        if (guarded < 0 || (pair == NULL && PyErr_Occurred())) done = -1;
    } else if (PyErr_Occurred()) {
        done = -1;
    }
    if (pair != NULL) {
        if (self->record(event_of(pair, START_ADDRESS), handle) == 0) {
            put(&record->lane, Py_NewRef(lane));
            put(&record->pair, Py_NewRef(pair));
            done = 1;
        } else {
            PyObject *pairs = PyObject_GetAttr(lane, str_pairs);
            if (pairs == NULL || PyList_Append(pairs, pair)) done = -1;
            Py_XDECREF(pairs);
        }
        Py_DECREF(pair);
    }
    Py_XDECREF(lane);
    return done;
}

static int check(PyObject *record) {
    if (PyObject_TypeCheck(record, record_type)) return 0;
    PyErr_Format(PyExc_TypeError, "a StageRecord is needed, not %R", record);
    return -1;
}

static PyObject *begin(EventRecorder *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "begin takes a record and a stream");
        return NULL;
    }
    if (check(args[0])) return NULL;
    int done = begin_fast(self, (StageRecord *)args[0], args[1]);
    if (done < 0) return NULL;
    if (done == 0) return PyObject_Vectorcall(self->begin_slowly, args, 2, NULL);
    Py_RETURN_NONE;
}

static PyObject *end(EventRecorder *self, PyObject *argument) {
    if (check(argument)) return NULL;
    StageRecord *record = (StageRecord *)argument;
    PyObject *lane = record->lane, *pair = record->pair;
    if (lane == NULL || pair == NULL) {
        PyErr_SetString(PyExc_TypeError, "the record has no lane or no pair");
        return NULL;
    }
    int guarded = is_guarded(lane);
    if (guarded < 0) return NULL;
    if (guarded == 0) {
        PyObject *raw = PyObject_GetAttr(lane, str_raw);
        if (raw == NULL) return NULL;
        int failed = self->record(event_of(pair, END_ADDRESS), PyLong_AsVoidPtr(raw));
        Py_DECREF(raw);
        if (!failed) Py_RETURN_NONE;
    }
    return PyObject_CallOneArg(self->end_slowly, argument);
}

static PyObject *create(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *function, *lanes, *device, *stream, *begin_slowly, *end_slowly;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "EventRecorder takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(
            args, "O!O!OOOO:EventRecorder", &PyLong_Type, &function, &PyList_Type, &lanes, &device, &stream,
            &begin_slowly, &end_slowly
        ))
        return NULL;
    void *pointer = PyLong_AsVoidPtr(function);
    if (pointer == NULL) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "the function's address is null");
        return NULL;
    }
    EventRecorder *self = (EventRecorder *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    self->record = (record_function)pointer;
    self->lanes = Py_NewRef(lanes);
    self->current_device = Py_NewRef(device);
    self->current_stream = Py_NewRef(stream);
    self->begin_slowly = Py_NewRef(begin_slowly);
    self->end_slowly = Py_NewRef(end_slowly);
    return (PyObject *)self;
}

static int traverse(EventRecorder *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->lanes);
    Py_VISIT(self->current_device);
    Py_VISIT(self->current_stream);
    Py_VISIT(self->begin_slowly);
    Py_VISIT(self->end_slowly);
    return 0;
}

static int clear(EventRecorder *self) {
    Py_CLEAR(self->lanes);
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
    str_guarded = PyUnicode_InternFromString("guarded");
    str_pairs = PyUnicode_InternFromString("pairs");
    str_raw = PyUnicode_InternFromString("raw");
    zero = PyLong_FromLong(0);
    if (!str_cuda_stream || !str_device_index || !str_guarded || !str_pairs || !str_raw || !zero) return -1;
    PyObject *type = PyType_FromModuleAndSpec(module, &spec, NULL);
    if (type == NULL) return -1;
    int failed = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return failed;
}
