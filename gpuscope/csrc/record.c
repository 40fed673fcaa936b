/* The record of one run of a stage, and the recorder: plain members, nothing that acts. */
#include "native.h"

PyTypeObject *record_type, *recorder_type;

#define OPTIONAL_IN_RECORD(X) X(attributes) X(error) X(lane) X(outer) X(pair) X(range) X(restore) X(span)
#define REQUIRED_IN_RECORD(X) X(recorder) X(site) X(thread) X(trace)
#define OPTIONAL_IN_RECORDER(X) X(bridge) X(look_for_provider) X(nvtx)
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
    {NULL},
};

#undef OPTIONAL
#undef REQUIRED

static int traverse_record(StageRecord *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    OPTIONAL_IN_RECORD(VISIT)
    REQUIRED_IN_RECORD(VISIT)
    return 0;
}

static int clear_record(StageRecord *self) {
    OPTIONAL_IN_RECORD(CLEAR)
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

/* ---- RecorderFields */

#define OPTIONAL(name) {#name, T_OBJECT, offsetof(Recorder, name), 0, NULL},
#define REQUIRED(name) {#name, T_OBJECT_EX, offsetof(Recorder, name), 0, NULL},

static PyMemberDef recorder_members[] = {OPTIONAL_IN_RECORDER(OPTIONAL) REQUIRED_IN_RECORDER(REQUIRED){NULL}};

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
    record_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &record_spec, NULL);
    recorder_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &recorder_spec, NULL);
    if (record_type == NULL || recorder_type == NULL) return -1;
    return PyModule_AddType(module, record_type) || PyModule_AddType(module, recorder_type) ? -1 : 0;
}
