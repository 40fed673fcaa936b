/*
 * The record of one run of a stage, its trace, its stream, and the recorder: plain members, nothing that acts. The
 * twins are in `_data/record.py`; the recorder's is in `_data/interfaces.py`.
 */
#include "watch.h"

PyTypeObject *record_type, *recorder_type, *trace_type, *timed_stream_type;

#define OPTIONAL_IN_RECORD(X) X(attributes) X(before) X(error) X(members) X(timed_stream) X(outer) X(pair) X(range) X(context_before) X(span)
#define REQUIRED_IN_RECORD(X) X(recorder) X(site) X(thread) X(trace)
#define HIDDEN_IN_RECORD(X) X(start_from) X(end_from)
#define OPTIONAL_IN_RECORDER(X) X(bridge) X(current_context) X(flight) X(look_for_provider) X(nvtx)
#define REQUIRED_IN_RECORDER(X) X(capacity) X(clock) X(device) X(ledger) X(queue) X(random_bits) X(span_ids) X(waiting)

#define VISIT(name) Py_VISIT(self->name);
#define CLEAR(name) Py_CLEAR(self->name);

/* ---- StageRecord */

#define OPTIONAL(name) {#name, T_OBJECT, offsetof(StageRecord, name), 0, NULL},
#define REQUIRED(name) {#name, T_OBJECT_EX, offsetof(StageRecord, name), 0, NULL},

static PyMemberDef record_members[] = {
    OPTIONAL_IN_RECORD(OPTIONAL) REQUIRED_IN_RECORD(REQUIRED)
    {"start_ns", T_LONGLONG, offsetof(StageRecord, start_ns), 0, NULL},
    {"end_ns", T_LONGLONG, offsetof(StageRecord, end_ns), 0, NULL},
    {"span_id", T_ULONGLONG, offsetof(StageRecord, span_id), 0, NULL},
    {"place", T_ULONGLONG, offsetof(StageRecord, place), 0, NULL},
    {NULL},
};

#undef OPTIONAL
#undef REQUIRED

static int traverse_record(StageRecord *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    OPTIONAL_IN_RECORD(VISIT)
    HIDDEN_IN_RECORD(VISIT)
    REQUIRED_IN_RECORD(VISIT)
    return 0;
}

static int clear_record(StageRecord *self) {
    count_left(self);
    OPTIONAL_IN_RECORD(CLEAR)
    HIDDEN_IN_RECORD(CLEAR)
    REQUIRED_IN_RECORD(CLEAR)
    return 0;
}

static void free_record(StageRecord *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    /* A chain of enclosing stages may be as deep as the recursion that made it. */
    Py_TRASHCAN_BEGIN(self, free_record)
    clear_record(self);
    type->tp_free(self);
    Py_DECREF(type);
    Py_TRASHCAN_END
}

static PyType_Slot record_slots[] = {
    {Py_tp_doc, "One run of a stage, as the application's thread saw it."},
    {Py_tp_members, record_members},
    {Py_tp_traverse, traverse_record},
    {Py_tp_clear, clear_record},
    {Py_tp_dealloc, free_record},
    {0, NULL},
};

static PyType_Spec record_spec = {
    .name = "gpuscope._native.StageRecord",
    .basicsize = sizeof(StageRecord),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = record_slots,
};

/* ---- Trace */

static PyMemberDef trace_members[] = {
    {"root", T_OBJECT_EX, offsetof(Trace, root), 0, NULL},
    {"sampled", T_OBJECT, offsetof(Trace, sampled), 0, NULL},
    {"state", T_OBJECT, offsetof(Trace, state), 0, NULL},
    {"parent_id", T_ULONGLONG, offsetof(Trace, parent_id), 0, NULL},
    {"remote", T_BOOL, offsetof(Trace, remote), 0, NULL},
    {NULL},
};

static PyObject *get_trace_id(Trace *self, void *Py_UNUSED(closure)) {
    PyObject *bits = PyLong_FromLong(64), *high = PyLong_FromUnsignedLongLong(self->high);
    PyObject *low = PyLong_FromUnsignedLongLong(self->low), *shifted = NULL, *id = NULL;
    if (bits != NULL && high != NULL) shifted = PyNumber_Lshift(high, bits);
    if (shifted != NULL && low != NULL) id = PyNumber_Or(shifted, low);
    Py_XDECREF(bits);
    Py_XDECREF(high);
    Py_XDECREF(low);
    Py_XDECREF(shifted);
    return id;
}

int split_trace_id(PyObject *id, unsigned long long *high, unsigned long long *low) {
    PyObject *bits = PyLong_FromLong(64), *above = bits == NULL ? NULL : PyNumber_Rshift(id, bits);
    if (above != NULL) {
        *high = PyLong_AsUnsignedLongLong(above);
        *low = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLongLongMask(id);
    }
    Py_XDECREF(bits);
    Py_XDECREF(above);
    return PyErr_Occurred() ? -1 : 0;
}

static int set_trace_id(Trace *self, PyObject *id, void *Py_UNUSED(closure)) {
    if (id != NULL) return split_trace_id(id, &self->high, &self->low);
    PyErr_SetString(PyExc_AttributeError, "`trace_id` cannot be deleted");
    return -1;
}

static PyGetSetDef trace_properties[] = {
    {"trace_id", (getter)get_trace_id, (setter)set_trace_id, NULL, NULL},
    {NULL},
};

static void free_trace(Trace *self) {
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(self->root);
    Py_XDECREF(self->sampled);
    Py_XDECREF(self->state);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot trace_slots[] = {
    {Py_tp_doc, "The trace that a stage belongs to."},
    {Py_tp_members, trace_members},
    {Py_tp_getset, trace_properties},
    {Py_tp_dealloc, free_trace},
    {0, NULL},
};

static PyType_Spec trace_spec = {
    .name = "gpuscope._native.Trace",
    .basicsize = sizeof(Trace),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = trace_slots,
};

/* ---- TimedStreamFields */

static PyMemberDef timed_stream_members[] = {
    {"context", T_OBJECT, offsetof(TimedStream, context), 0, NULL},
    {"handle", T_OBJECT, offsetof(TimedStream, handle), 0, NULL},
    {"pairs", T_OBJECT, offsetof(TimedStream, pairs), 0, NULL},
    {"raw", T_ULONGLONG, offsetof(TimedStream, raw), 0, NULL},
    {"index", T_PYSSIZET, offsetof(TimedStream, index), 0, NULL},
    {"foreign", T_BOOL, offsetof(TimedStream, foreign), 0, NULL},
    {"guarded", T_BOOL, offsetof(TimedStream, guarded), 0, NULL},
    {NULL},
};

static int traverse_timed_stream(TimedStream *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->context);
    Py_VISIT(self->handle);
    Py_VISIT(self->pairs);
    Py_VISIT(self->last_pair);
    return 0;
}

static int clear_timed_stream(TimedStream *self) {
    forget_last(self);
    Py_CLEAR(self->context);
    Py_CLEAR(self->handle);
    Py_CLEAR(self->pairs);
    return 0;
}

static void free_timed_stream(TimedStream *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    release_watch(self);
    clear_timed_stream(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot timed_stream_slots[] = {
    {Py_tp_doc, "A stream of a device, and the pool of event pairs that it draws on."},
    {Py_tp_members, timed_stream_members},
    {Py_tp_traverse, traverse_timed_stream},
    {Py_tp_clear, clear_timed_stream},
    {Py_tp_dealloc, free_timed_stream},
    {0, NULL},
};

static PyType_Spec timed_stream_spec = {
    .name = "gpuscope._native.TimedStreamFields",
    .basicsize = sizeof(TimedStream),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = timed_stream_slots,
};

/* ---- RecorderFields */

#define OPTIONAL(name) {#name, T_OBJECT, offsetof(Recorder, name), 0, NULL},
#define REQUIRED(name) {#name, T_OBJECT_EX, offsetof(Recorder, name), 0, NULL},

static PyMemberDef recorder_members[] = {
    OPTIONAL_IN_RECORDER(OPTIONAL) REQUIRED_IN_RECORDER(REQUIRED)
    {"paused", T_BOOL, offsetof(Recorder, paused), 0, NULL},
    {NULL},
};

static int traverse_recorder(Recorder *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    OPTIONAL_IN_RECORDER(VISIT)
    REQUIRED_IN_RECORDER(VISIT)
    return 0;
}

static int clear_recorder(Recorder *self) {
    OPTIONAL_IN_RECORDER(CLEAR)
    REQUIRED_IN_RECORDER(CLEAR)
    return 0;
}

static void free_recorder(Recorder *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear_recorder(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot recorder_slots[] = {
    {Py_tp_doc, "What recording needs."},
    {Py_tp_members, recorder_members},
    {Py_tp_traverse, traverse_recorder},
    {Py_tp_clear, clear_recorder},
    {Py_tp_dealloc, free_recorder},
    {0, NULL},
};

static PyType_Spec recorder_spec = {
    .name = "gpuscope._native.RecorderFields",
    .basicsize = sizeof(Recorder),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = recorder_slots,
};

int add_record(PyObject *module) {
    if (add_type(module, &record_spec, &record_type) || add_type(module, &recorder_spec, &recorder_type)) return -1;
    return add_type(module, &trace_spec, &trace_type) || add_type(module, &timed_stream_spec, &timed_stream_type) ? -1 : 0;
}
