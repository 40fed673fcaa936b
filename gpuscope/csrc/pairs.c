/*
 * Pairs of events, and who holds them: see `sharing.h`. The twin is the tuple of `_cuda/timed_stream.py`, which belongs to
 * one stage.
 */
#include "watch.h"

PyTypeObject *pair_type;

/* Takes over a reference to a pair that was taken from the pool or shared. The last to let go puts it back. */
static int release(PyObject *pairs, PyObject *pair) {
    int failed = 0, is_ours = Py_IS_TYPE(pair, pair_type);
    if (is_ours && ((EventPair *)pair)->users > 1) {
        ((EventPair *)pair)->users--;
    } else {
        if (is_ours) ((EventPair *)pair)->users = 0;
        failed = pairs == NULL || !PyList_Check(pairs) || PyList_Append(pairs, pair);
        if (failed && !PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "`pairs` of a stream is a list");
    }
    Py_DECREF(pair);
    return failed;
}

static int is_pair(PyObject *object) {
    return Py_IS_TYPE(object, pair_type) || (PyTuple_CheckExact(object) && PyTuple_GET_SIZE(object) == 4);
}

/* A new reference. Null without an exception where there is none. */
static PyObject *pool_of(PyObject *stream) {
    if (stream == NULL) return NULL;
    if (PyObject_TypeCheck(stream, timed_stream_type)) return Py_XNewRef(((TimedStream *)stream)->pairs);
    return PyObject_GetAttrString(stream, "pairs");
}

int give_back(StageRecord *record) {
    count_left(record);
    PyObject **held[] = {&record->pair, &record->start_from, &record->end_from}, *pairs = NULL;
    int failed = 0;
    for (int i = 0; i < 3; i++) {
        PyObject *pair = *held[i];
        *held[i] = NULL;
        if (pair == NULL || !is_pair(pair)) {
            Py_XDECREF(pair);
            continue;
        }
        if (pairs == NULL) {
            pairs = pool_of(record->timed_stream);
            failed = pairs == NULL && PyErr_Occurred();
        }
        if (failed) Py_DECREF(pair);
        else failed = release(pairs, pair);
    }
    Py_XDECREF(pairs);
    return failed ? -1 : 0;
}

void forget_last(TimedStream *timed_stream) {
    PyObject *pair = timed_stream->last_pair;
    timed_stream->last_pair = NULL;
    if (pair != NULL && release(timed_stream->pairs, pair)) PyErr_Clear();
}

static PyObject *py_give_back(PyObject *Py_UNUSED(module), PyObject *record) {
    if (!PyObject_TypeCheck(record, record_type))
        return PyErr_Format(PyExc_TypeError, "expected a StageRecord, got %R", record);
    if (give_back((StageRecord *)record)) return NULL;
    Py_RETURN_NONE;
}

static PyObject *end_sharing(PyObject *Py_UNUSED(module), PyObject *timed_stream) {
    if (!PyObject_TypeCheck(timed_stream, timed_stream_type))
        return PyErr_Format(PyExc_TypeError, "expected a TimedStream, got %R", timed_stream);
    ((TimedStream *)timed_stream)->is_over = 1;
    forget_last((TimedStream *)timed_stream);
    Py_RETURN_NONE;
}

static PyObject *event_object(PyObject *from, void *event, PyObject *own, Py_ssize_t which) {
    if (from == NULL) return PySequence_GetItem(own, which);
    return Py_NewRef(((EventPair *)from)->parts[event == ((EventPair *)from)->events[0] ? 0 : 1]);
}

/* events_of(record): its start and its end event, whosever pair they are of; None without any. */
static PyObject *events_of(PyObject *Py_UNUSED(module), PyObject *argument) {
    if (!PyObject_TypeCheck(argument, record_type))
        return PyErr_Format(PyExc_TypeError, "expected a StageRecord, got %R", argument);
    StageRecord *record = (StageRecord *)argument;
    if (!is_present(record->pair)) Py_RETURN_NONE;
    PyObject *start = event_object(record->start_from, record->start_event, record->pair, 0);
    PyObject *end = start == NULL ? NULL : event_object(record->end_from, record->end_event, record->pair, 1);
    return end == NULL ? (Py_XDECREF(start), NULL) : Py_BuildValue("NN", start, end);
}

/* EventPair(start, end, start_address, end_address) */
static PyObject *create(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *parts[4];
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs))
        return PyErr_Format(PyExc_TypeError, "EventPair takes no keyword arguments");
    if (!PyArg_ParseTuple(
            args, "OOO!O!:EventPair", &parts[0], &parts[1], &PyLong_Type, &parts[2], &PyLong_Type, &parts[3]
        ))
        return NULL;
    void *start = PyLong_AsVoidPtr(parts[2]), *end = start == NULL ? NULL : PyLong_AsVoidPtr(parts[3]);
    if (end == NULL) return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "an event's address is null");
    EventPair *self = (EventPair *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    for (int i = 0; i < 4; i++) self->parts[i] = Py_NewRef(parts[i]);
    self->events[0] = start;
    self->events[1] = end;
    self->users = 1;
    return (PyObject *)self;
}

static Py_ssize_t length(PyObject *Py_UNUSED(self)) { return 4; }

static PyObject *item(EventPair *self, Py_ssize_t i) {
    if (i >= 0 && i < 4) return Py_NewRef(self->parts[i]);
    PyErr_SetString(PyExc_IndexError, "a pair has four parts");
    return NULL;
}

static void dealloc(EventPair *self) {
    PyTypeObject *type = Py_TYPE(self);
    for (int i = 0; i < 4; i++) Py_XDECREF(self->parts[i]);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMemberDef members[] = {
    {"users", T_INT, offsetof(EventPair, users), 0, "How many hold it."},
    {NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Two events, which neighbouring stages may share."},
    {Py_tp_new, create},
    {Py_tp_members, members},
    {Py_tp_dealloc, dealloc},
    {Py_sq_length, length},
    {Py_sq_item, item},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "gpuscope._native.EventPair",
    .basicsize = sizeof(EventPair),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

static PyMethodDef functions[] = {
    {"give_back", py_give_back, METH_O, "Return a record's events to the pool, those that no other stage needs."},
    {"end_sharing", end_sharing, METH_O, "Give the newest event of a stream back, for good."},
    {"events_of", events_of, METH_O, "Return a record's start and end event."},
    {NULL},
};

int add_pairs(PyObject *module) {
    pair_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    return pair_type == NULL || PyModule_AddType(module, pair_type) ? -1 : PyModule_AddFunctions(module, functions);
}
