/*
 * Stages whose GPU work is done, into host time. The twin is `Resolver._resolve` with `GpuClock.place`.
 */
#include "native.h"

typedef int (*elapsed_function)(float *milliseconds, void *start, void *end);

static PyObject *str_pairs;

typedef struct {
    void *start, *end;
    float duration_ms, end_ms;
    int failed;
} Distance;

/* The terms of a `GpuClock`: see there. */
typedef struct {
    long long host_ns, half_ns;
    double host_ns_per_ms, doubt_ns_per_ms;
} Clock;

static Distance *distances_of(PyObject *records, Py_ssize_t count) {
    Distance *all = PyMem_Calloc(count ? count : 1, sizeof *all);
    if (all == NULL) return (Distance *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *record = PyList_GET_ITEM(records, i);
        if (!PyObject_TypeCheck(record, record_type)) {
            PyErr_Format(PyExc_TypeError, "a StageRecord is needed, not %R", record);
            PyMem_Free(all);
            return NULL;
        }
        PyObject *pair = ((StageRecord *)record)->pair;
        all[i].start = event_of(pair, START_ADDRESS);
        all[i].end = event_of(pair, END_ADDRESS);
    }
    return all;
}

/* Without the GIL: the driver may wait for a lock that the application's thread holds. */
static void measure(elapsed_function elapsed, void *anchor, Distance *all, Py_ssize_t count) {
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++) {
        Distance *one = &all[i];
        one->failed = !one->start || !one->end || elapsed(&one->duration_ms, one->start, one->end) ||
                      elapsed(&one->end_ms, anchor, one->end);
    }
    Py_END_ALLOW_THREADS
}

static int give_back(StageRecord *record) {
    PyObject *pair = record->pair, *pairs = record->lane == NULL ? NULL : PyObject_GetAttr(record->lane, str_pairs);
    record->pair = NULL;
    int failed = pairs == NULL || PyList_Append(pairs, pair);
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
    long long start_ns = end_ns - (long long)((double)one->duration_ms * 1e6);
    double age_ms = one->end_ms < 0 ? -(double)one->end_ms : (double)one->end_ms;
    long long uncertainty_ns = clock->half_ns + (long long)(age_ms * clock->doubt_ns_per_ms) + 1;
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

/* Rows up to the first record whose events can't be timed: that is for the caller to look at before any after it. */
static PyObject *rows_of(PyObject *records, const Distance *all, const Clock *clock, int clamped) {
    PyObject *rows = PyList_New(0);
    for (Py_ssize_t i = 0; rows != NULL && i < PyList_GET_SIZE(records) && !all[i].failed; i++) {
        PyObject *row = place_one((StageRecord *)PyList_GET_ITEM(records, i), &all[i], clock, clamped);
        if (row == NULL || PyList_Append(rows, row)) Py_CLEAR(rows);
        Py_XDECREF(row);
    }
    return rows;
}

/* place(records, elapsed, anchor, clamped, host_ns, half_ns, host_ns_per_ms, doubt_ns_per_ms) */
static PyObject *place(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *records, *function, *event;
    int clamped;
    Clock clock;
    if (!PyArg_ParseTuple(
            args, "O!O!O!iLLdd:place", &PyList_Type, &records, &PyLong_Type, &function, &PyLong_Type, &event, &clamped,
            &clock.host_ns, &clock.half_ns, &clock.host_ns_per_ms, &clock.doubt_ns_per_ms
        ))
        return NULL;
    elapsed_function elapsed = (elapsed_function)PyLong_AsVoidPtr(function);
    void *anchor = PyLong_AsVoidPtr(event);
    Py_ssize_t count = PyList_GET_SIZE(records);
    if (elapsed == NULL) return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "the function's address is null");
    Distance *all = PyErr_Occurred() ? NULL : distances_of(records, count);
    if (all == NULL) return NULL;
    measure(elapsed, anchor, all, count);
    PyObject *rows = rows_of(records, all, &clock, clamped);
    PyMem_Free(all);
    return rows;
}

static PyMethodDef functions[] = {
    {"place", place, METH_VARARGS, "Return rows of records, up to the first whose events can't be timed."},
    {NULL},
};

int add_place(PyObject *module) {
    str_pairs = PyUnicode_InternFromString("pairs");
    return str_pairs == NULL ? -1 : PyModule_AddFunctions(module, functions);
}
