/*
 * Stages whose GPU work is done, into host time. The twins are `Resolver._resolve` of `_collecting/resolve.py` with
 * `GpuClock.place` of `_cuda/clock.py`, and `stream_of_all` of `_collecting/resolve.py`.
 */
#include "native.h"

static PyObject *str_pairs;

/* A record of the list, or null: there are no more, or it is none. */
static const StageRecord *record_at(PyObject *records, Py_ssize_t i) {
    PyObject *record = i < PyList_GET_SIZE(records) ? PyList_GET_ITEM(records, i) : NULL;
    return record != NULL && PyObject_TypeCheck(record, record_type) ? (const StageRecord *)record : NULL;
}

/* Has the addresses of the events of later pairs fetched: first the pair, and halfway its numbers. */
static void fetch_ahead(PyObject *records, Py_ssize_t i) {
    const StageRecord *far = record_at(records, i + AHEAD), *near = record_at(records, i + AHEAD / 2);
    if (far != NULL && far->pair != NULL) FETCH(far->pair);
    if (near == NULL || near->pair == NULL || !PyTuple_CheckExact(near->pair) || PyTuple_GET_SIZE(near->pair) != 4)
        return;
    FETCH(PyTuple_GET_ITEM(near->pair, START_ADDRESS));
    FETCH(PyTuple_GET_ITEM(near->pair, END_ADDRESS));
}

/* stream_of_all(records): the stream that all of them were timed on; None if some were not, or on another. */
static PyObject *stream_of_all(PyObject *Py_UNUSED(module), PyObject *records) {
    if (!PyList_Check(records)) {
        PyErr_SetString(PyExc_TypeError, "stream_of_all takes a list");
        return NULL;
    }
    PyObject *found = Py_None;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(records); i++) {
        if (i + AHEAD < PyList_GET_SIZE(records)) {
            const char *later = (const char *)PyList_GET_ITEM(records, i + AHEAD);
            FETCH(later);
            FETCH(later + 64);
            FETCH(later + 128);
        }
        const StageRecord *record = record_at(records, i);
        PyObject *stream = record == NULL || !is_present(record->pair) ? NULL : record->timed_stream;
        if (!is_present(stream) || (i > 0 && stream != found)) Py_RETURN_NONE;
        found = stream;
    }
    return Py_NewRef(found);
}

Distance *distances_of(PyObject *records, Py_ssize_t count) {
    Distance *all = PyMem_Calloc(count ? count : 1, sizeof *all);
    if (all == NULL) return (Distance *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *record = PyList_GET_ITEM(records, i);
        if (!PyObject_TypeCheck(record, record_type)) {
            PyErr_Format(PyExc_TypeError, "expected a StageRecord, got %R", record);
            PyMem_Free(all);
            return NULL;
        }
        fetch_ahead(records, i);
        PyObject *pair = ((StageRecord *)record)->pair;
        all[i].start = event_of(pair, START_ADDRESS);
        all[i].end = event_of(pair, END_ADDRESS);
    }
    return all;
}

static int give_back(StageRecord *record) {
    if (record->pair == NULL) return 0; /* Another thread had the GIL in between; none of ours takes a pair away. */
    PyObject *pair = record->pair, *stream = record->timed_stream;
    if (stream != NULL && PyObject_TypeCheck(stream, timed_stream_type) && ((TimedStream *)stream)->pairs != NULL) {
        PyObject *pool = ((TimedStream *)stream)->pairs;
        if (PyList_CheckExact(pool)) {
            record->pair = NULL;
            int refused = PyList_Append(pool, pair);
            Py_DECREF(pair);
            return refused;
        }
    }
    PyObject *pairs = stream == NULL ? NULL : PyObject_GetAttr(stream, str_pairs);
    record->pair = NULL;
    int failed = pairs == NULL || !PyList_Check(pairs) || PyList_Append(pairs, pair);
    if (failed && !PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "`pairs` of a stream is a list");
    Py_XDECREF(pairs);
    Py_XDECREF(pair);
    return failed ? -1 : 0;
}

static PyObject *new_row(StageRecord *record, long long start_ns, long long end_ns, long long uncertainty_ns, int flags) {
    PyObject *row = PyTuple_New(5);
    if (row == NULL) return NULL;
    const long long numbers[] = {start_ns, end_ns, uncertainty_ns, flags};
    PyTuple_SET_ITEM(row, 0, Py_NewRef((PyObject *)record));
    for (int i = 0; i < 4; i++) {
        PyObject *number = PyLong_FromLongLong(numbers[i]);
        if (number == NULL) {
            Py_DECREF(row);
            return NULL;
        }
        PyTuple_SET_ITEM(row, i + 1, number);
    }
    return row;
}

/* The row `(record, GPU start, GPU end, uncertainty, flags)`. */
static PyObject *place_one(StageRecord *record, const Distance *one, const Clock *clock, int clamped) {
    long long end_ns = clock->host_ns + (long long)((double)one->end_ms * clock->host_ns_per_ms);
    long long start_ns = end_ns - (long long)((double)one->duration_ms * clock->host_ns_per_ms);
    double age_ms = one->end_ms < 0 ? -(double)one->end_ms : (double)one->end_ms;
    long long uncertainty_ns = clock->half_ns + (long long)((age_ms + (double)one->duration_ms) * clock->doubt_ns_per_ms) + 1;
    long long early_ns = record->start_ns - start_ns;
    int flags = 0;
    if (early_ns > 0) {
        /* Nothing runs before it is launched, so the launch is the better reading of the two. */
        flags = early_ns > uncertainty_ns ? clamped : 0;
        start_ns += early_ns;
        end_ns += early_ns;
    }
    return give_back(record) ? NULL : new_row(record, start_ns, end_ns, uncertainty_ns, flags);
}

PyObject *rows_of(PyObject *records, const Distance *all, Py_ssize_t count, const Clock *clock, int clamped) {
    PyObject *rows = PyList_New(0);
    for (Py_ssize_t i = 0; rows != NULL && i < count && i < PyList_GET_SIZE(records); i++) {
        PyObject *row = place_one((StageRecord *)PyList_GET_ITEM(records, i), &all[i], clock, clamped);
        if (row == NULL || PyList_Append(rows, row)) Py_CLEAR(rows);
        Py_XDECREF(row);
    }
    return rows;
}

static PyMethodDef functions[] = {
    {"stream_of_all", stream_of_all, METH_O, "Return the stream that all records were timed on, or None."},
    {NULL},
};

int add_place(PyObject *module) {
    str_pairs = PyUnicode_InternFromString("pairs");
    return str_pairs == NULL || PyModule_AddFunctions(module, functions) ? -1 : 0;
}
