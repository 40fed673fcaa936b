/*
 * What the files of `gpuscope._native` share: the record of a stage, and the doors between them.
 *
 * Everything here has a twin in Python that says what it does at more length and is used where this was not built: in
 * `_record.py`, `_recording.py`, `_block.py`, `_cuda_device.py`, `_resolve.py`, `_batch.py` and `exporters/_otlp_bytes.py`. The common
 * path is here; what is rare is handed back to the Python functions that `prepare` was given.
 */
#ifndef GPUSCOPE_NATIVE_H
#define GPUSCOPE_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

/* One run of a stage: `StageRecord` of `_record.py`. A null object is None where it may be absent. */
typedef struct {
    PyObject_HEAD
    PyObject *attributes, *error, *lane, *outer, *pair, *range, *restore, *span;
    PyObject *recorder, *site, *thread, *trace;
    long long start_ns, end_ns;
    unsigned long long span_id;
} StageRecord;

/* What recording needs: `RecorderFields` of `_record.py`. */
typedef struct {
    PyObject_HEAD
    PyObject *bridge, *capacity, *clock, *device, *ledger, *look_for_provider, *nvtx, *queue, *random_bits, *span_ids;
    PyObject *waiting;
} Recorder;

/* A `with stage(...)` block: `StageBlock` of `_block.py`. */
typedef struct {
    StageRecord record;
    PyObject *owner, *stream;
    char uses;
} StageBlock;

extern PyTypeObject *record_type, *recorder_type, *block_type;

static inline int is_present(const PyObject *object) { return object != NULL && object != Py_None; }

static inline void put(PyObject **slot, PyObject *owned) {
    PyObject *old = *slot;
    *slot = owned;
    Py_XDECREF(old);
}

/* Pairs are `(start, end, start's address, end's address)`. */
enum { START_ADDRESS = 2, END_ADDRESS = 3 };

/* Null, which the driver refuses, for what is no pair. */
static inline void *event_of(PyObject *pair, Py_ssize_t which) {
    return pair != NULL && PyTuple_CheckExact(pair) && PyTuple_GET_SIZE(pair) == 4
               ? PyLong_AsVoidPtr(PyTuple_GET_ITEM(pair, which))
               : NULL;
}

/* Null and an exception for what is none. */
Recorder *as_recorder(PyObject *object);

/* Each holds `recorder` itself, and fails only with what is no `Exception`. */
int begin_stage(Recorder *recorder, StageRecord *record, PyObject *site, PyObject *stream, PyObject *suspends);
int end_stage(StageRecord *record, PyObject *error);

/* Each adds its types and functions to the module; -1 and an exception on failure. */
int add_record(PyObject *module);
int add_recording(PyObject *module);
int add_block(PyObject *module);
int add_events(PyObject *module);
int add_place(PyObject *module);
int add_pack(PyObject *module);
int add_join(PyObject *module);

#endif
