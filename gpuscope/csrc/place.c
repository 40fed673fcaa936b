/*
 * Stages whose GPU work is done, into host time. The twins are `Resolver._resolve` of `_collecting/resolve.py` with
 * `GpuClock.place` and `less_events` of `_cuda/clock.py`, and `stream_of_all` of `_collecting/resolve.py`.
 */
#include "native.h"

/* A record of the list; null behind its end, and for what is not a record. */
static const StageRecord *record_at(PyObject *records, Py_ssize_t i) {
    PyObject *record = i < PyList_GET_SIZE(records) ? PyList_GET_ITEM(records, i) : NULL;
    return record != NULL && PyObject_TypeCheck(record, record_type) ? (const StageRecord *)record : NULL;
}

/* Has a later pair fetched, which has the addresses of its events in it. */
static void fetch_ahead(PyObject *records, Py_ssize_t i) {
    const StageRecord *far = record_at(records, i + AHEAD);
    if (far != NULL && far->pair != NULL) FETCH(far->pair);
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
        const StageRecord *one = (StageRecord *)record;
        all[i].start = one->start_from != NULL ? one->start_event : event_of(one->pair, START_ADDRESS);
        all[i].end = one->end_from != NULL ? one->end_event : event_of(one->pair, END_ADDRESS);
    }
    return all;
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
static PyObject *place_one(StageRecord *record, const Distance *one, const Clock *clock, PlaceFlags may) {
    long long end_ns = clock->host_ns + (long long)((double)one->end_ms * clock->host_ns_per_ms);
    long long start_ns = end_ns - (long long)((double)one->duration_ms * clock->host_ns_per_ms);
    double age_ms = one->end_ms < 0 ? -(double)one->end_ms : (double)one->end_ms;
    long long uncertainty_ns = clock->half_ns + (long long)((age_ms + (double)one->duration_ms) * clock->doubt_ns_per_ms) + 1;
    long long early_ns = record->start_ns - start_ns;
    int flags = 0;
    if (early_ns > 0 && record->start_from != NULL) {
        /* The event was shared, and recorded before the stage was entered; one of its own would have come then. */
        start_ns = record->start_ns;
        if (end_ns < start_ns) end_ns = start_ns;
    } else if (early_ns > 0) {
        /* Nothing runs before it is launched, so the launch is the better reading of the two. */
        flags = early_ns > uncertainty_ns ? may.clamped : 0;
        start_ns += early_ns;
        end_ns += early_ns;
    } else if (clock->event_cost_ns > 0 && start_ns - uncertainty_ns >= record->end_ns) {
        /* All its work was waiting when the GPU came to it, so that its events lie in no time in which it waited. */
        end_ns -= clock->event_cost_ns;
        if (start_ns > end_ns) start_ns = end_ns;
        flags = may.trimmed;
    }
    return give_back(record) ? NULL : new_row(record, start_ns, end_ns, uncertainty_ns, flags);
}

PyObject *rows_of(PyObject *records, const Distance *all, Py_ssize_t count, const Clock *clock, PlaceFlags flags) {
    PyObject *rows = PyList_New(0);
    for (Py_ssize_t i = 0; rows != NULL && i < count && i < PyList_GET_SIZE(records); i++) {
        PyObject *row = place_one((StageRecord *)PyList_GET_ITEM(records, i), &all[i], clock, flags);
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
    return PyModule_AddFunctions(module, functions);
}
