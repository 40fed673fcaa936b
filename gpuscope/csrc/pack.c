/*
 * Rows into the cells of a batch's columns. The twin is `BatchBuilder._pack_in_python` of
 * `_collecting/batch_builder.py`.
 */
#include "native.h"

#include <stddef.h>

static PyObject *str_calls, *str_index, *str_raw, *str_warms_up, *str_warmup;

/* One row of a batch. The twin is `ROW` of `_data/row.py`. */
typedef struct {
    unsigned long long trace_high, trace_low, span_id, parent_id, stream;
    long long site, root, thread, sampled;
    long long host_start_ns, host_end_ns, gpu_start_ns, gpu_end_ns, uncertainty_ns;
    long long device, flags;
} Cells;

/* When a stage's ids are its own: never (ask), once the sampling of its trace is decided, or always. */
enum { ASK, DECIDED, OWN };

typedef struct {
    PyObject *sites, *threads, *identify;
    int own, warmup_flag, remote_flag;
    long long warmup;
} Packing;

static int read_id(PyObject *object, PyObject *name, unsigned long long *id) {
    PyObject *value = PyObject_GetAttr(object, name);
    if (value == NULL) return -1;
    *id = PyLong_AsUnsignedLongLong(value);
    Py_DECREF(value);
    return PyErr_Occurred() ? -1 : 0;
}

/* Whether the ids are the stage's own, and then fills them in; otherwise `identify` has to say. */
static int own_identity(const Packing *packing, StageRecord *record, const Trace *trace, Cells *cells) {
    if (packing->own == ASK || is_present(record->span)) return 0;
    if (packing->own == DECIDED && !is_present(trace->sampled)) return 0;
    cells->sampled = trace->sampled != Py_False;
    cells->parent_id = trace->parent_id;
    if (is_present(record->outer)) {
        StageRecord *outer = (StageRecord *)record->outer;
        if (!PyObject_TypeCheck(record->outer, record_type) || outer->trace != (PyObject *)trace ||
            is_present(outer->span))
            return 0;
        cells->parent_id = outer->span_id;
    }
    cells->trace_high = trace->high;
    cells->trace_low = trace->low;
    cells->span_id = record->span_id;
    put(&record->context_before, NULL);
    return 1;
}

static int asked_identity(const Packing *packing, StageRecord *record, Cells *cells) {
    PyObject *answer = PyObject_CallOneArg(packing->identify, (PyObject *)record), *trace_id;
    int sampled;
    int failed = answer == NULL ||
                 !PyArg_ParseTuple(answer, "OKKp", &trace_id, &cells->span_id, &cells->parent_id, &sampled) ||
                 split_trace_id(trace_id, &cells->trace_high, &cells->trace_low);
    cells->sampled = failed ? 0 : sampled;
    Py_XDECREF(answer);
    return failed ? -1 : 0;
}

/* The key's position in a table, where it is put if it is new; -1: an exception. */
static long long position(PyObject *table, PyObject *key) {
    PyObject *next = PyLong_FromSsize_t(PyDict_GET_SIZE(table));
    PyObject *found = next == NULL ? NULL : PyDict_SetDefault(table, key, next);
    long long answer = found == NULL ? -1 : PyLong_AsLongLong(found);
    Py_XDECREF(next);
    return answer;
}

static int count_call(const Packing *packing, PyObject *site, Cells *cells) {
    PyObject *before = PyObject_GetAttr(site, str_calls);
    PyObject *own = before == NULL ? NULL : PyObject_GetAttr(site, str_warmup);
    if (own == NULL) {
        Py_XDECREF(before);
        return -1;
    }
    long long calls = PyLong_AsLongLong(before) + 1;
    long long warmup = !is_present(own) ? packing->warmup : PyLong_AsLongLong(own);
    Py_DECREF(before);
    Py_DECREF(own);
    PyObject *after = PyErr_Occurred() ? NULL : PyLong_FromLongLong(calls);
    int failed = after == NULL || PyObject_SetAttr(site, str_calls, after);
    Py_XDECREF(after);
    if (calls <= warmup) cells->flags |= packing->warmup_flag;
    return failed ? -1 : 0;
}

static int fill_tables(const Packing *packing, PyObject *site, PyObject *thread, PyObject *root, Cells *cells) {
    PyObject *warms_up = PyObject_GetAttr(root, str_warms_up);
    if (warms_up == NULL) return -1;
    if (warms_up != Py_False) cells->flags |= packing->warmup_flag;
    Py_DECREF(warms_up);
    cells->site = position(packing->sites, site);
    cells->root = cells->site < 0 ? -1 : position(packing->sites, root);
    cells->thread = cells->root < 0 ? -1 : position(packing->threads, thread);
    return cells->thread < 0 ? -1 : 0;
}

static int fill_device(StageRecord *record, Cells *cells) {
    cells->device = -1;
    if (cells->gpu_end_ns == 0) return 0;
    PyObject *timed_stream = Py_XNewRef(record->timed_stream);
    PyObject *index = timed_stream == NULL ? NULL : PyObject_GetAttr(timed_stream, str_index);
    cells->device = index == NULL ? -1 : PyLong_AsLongLong(index);
    if (timed_stream == NULL) PyErr_SetString(PyExc_AttributeError, "timed_stream");
    int failed = index == NULL || PyErr_Occurred() || read_id(timed_stream, str_raw, &cells->stream);
    Py_XDECREF(index);
    Py_XDECREF(timed_stream);
    return failed ? -1 : 0;
}

/* The record of a row `(record, GPU start, GPU end, uncertainty, flags)`, or null and an exception. */
static StageRecord *read_row(PyObject *row, Cells *cells) {
    if (!PyTuple_CheckExact(row) || PyTuple_GET_SIZE(row) != 5 ||
        !PyObject_TypeCheck(PyTuple_GET_ITEM(row, 0), record_type)) {
        PyErr_SetString(PyExc_TypeError, "a row must be a tuple of a StageRecord and four numbers");
        return NULL;
    }
    cells->gpu_start_ns = PyLong_AsLongLong(PyTuple_GET_ITEM(row, 1));
    cells->gpu_end_ns = PyLong_AsLongLong(PyTuple_GET_ITEM(row, 2));
    cells->uncertainty_ns = PyLong_AsLongLong(PyTuple_GET_ITEM(row, 3));
    cells->flags = PyLong_AsLongLong(PyTuple_GET_ITEM(row, 4));
    return PyErr_Occurred() ? NULL : (StageRecord *)PyTuple_GET_ITEM(row, 0);
}

/* The record's trace, or null and an exception for what was never begun, or was taken apart since. */
static const Trace *whole_trace(const StageRecord *record) {
    if (record->trace && PyObject_TypeCheck(record->trace, trace_type) && record->site && record->thread)
        return (const Trace *)record->trace;
    PyErr_SetString(PyExc_AttributeError, "the record was never begun");
    return NULL;
}

/* Calls into Python, and so holds what it uses. */
static int fill_shared(const Packing *packing, const StageRecord *record, const Trace *trace, Cells *cells) {
    PyObject *site = Py_NewRef(record->site), *thread = Py_NewRef(record->thread);
    PyObject *root = Py_NewRef(trace->root ? trace->root : record->site);
    int failed = fill_tables(packing, site, thread, root, cells) || count_call(packing, site, cells);
    Py_DECREF(site);
    Py_DECREF(thread);
    Py_DECREF(root);
    return failed ? -1 : 0;
}

/* Counts the call last, because what fails is not to be counted. */
static int fill(const Packing *packing, PyObject *row, Cells *cells) {
    StageRecord *record = read_row(row, cells);
    const Trace *trace = record == NULL ? NULL : whole_trace(record);
    if (trace == NULL) return -1;
    if (!own_identity(packing, record, trace, cells)) {
        if (asked_identity(packing, record, cells) || (trace = whole_trace(record)) == NULL) return -1;
    }
    cells->host_start_ns = record->start_ns;
    cells->host_end_ns = record->end_ns;
    if (trace->remote && trace->parent_id == cells->parent_id) cells->flags |= packing->remote_flag;
    return fill_device(record, cells) || (trace = whole_trace(record)) == NULL ||
                   fill_shared(packing, record, trace, cells)
               ? -1
               : 0;
}

/* Takes back the calls of the first so many rows, and keeps the exception. The twin is `_uncount`. */
static void uncount(PyObject *rows, Py_ssize_t count) {
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    for (Py_ssize_t i = 0; i < count && i < PyList_GET_SIZE(rows); i++) {
        PyObject *row = PyList_GET_ITEM(rows, i), *record = PyTuple_CheckExact(row) ? PyTuple_GET_ITEM(row, 0) : NULL;
        PyObject *site = record && PyObject_TypeCheck(record, record_type) ? ((StageRecord *)record)->site : NULL;
        PyObject *calls = Py_XNewRef(site) ? PyObject_GetAttr(site, str_calls) : NULL;
        PyObject *before = calls && PyLong_Check(calls) ? PyLong_FromLongLong(PyLong_AsLongLong(calls) - 1) : NULL;
        if (before == NULL || PyObject_SetAttr(site, str_calls, before)) PyErr_Clear();
        Py_XDECREF(site);
        Py_XDECREF(calls);
        Py_XDECREF(before);
    }
    PyErr_Restore(type, error, traceback);
}

static int has_details(const StageRecord *record) {
    return is_present(record->attributes) || is_present(record->error) || is_present(record->span);
}

static int note_details(PyObject *with_details, PyObject *row, Py_ssize_t i) {
    if (!has_details((StageRecord *)PyTuple_GET_ITEM(row, 0))) return 0;
    PyObject *index = PyLong_FromSsize_t(i);
    int failed = index == NULL || PyList_Append(with_details, index);
    Py_XDECREF(index);
    return failed ? -1 : 0;
}

/*
 * pack(rows, sites, threads, identify, own, warmup, warmup_flag, remote_flag)
 *
 * The rows' cells as bytes, and the indices of the rows with details: those with attributes, an error or a span.
 */
static PyObject *pack(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *rows;
    Packing packing;
    if (!PyArg_ParseTuple(
            args, "O!O!O!OiLii:pack", &PyList_Type, &rows, &PyDict_Type, &packing.sites, &PyDict_Type, &packing.threads,
            &packing.identify, &packing.own, &packing.warmup, &packing.warmup_flag, &packing.remote_flag
        ))
        return NULL;
    Py_ssize_t count = PyList_GET_SIZE(rows);
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof(Cells));
    PyObject *with_details = PyList_New(0);
    int failed = bytes == NULL || with_details == NULL;
    for (Py_ssize_t i = 0; !failed && i < count; i++) {
        Cells cells = {0};
        PyObject *row = PyList_GetItem(rows, i);
        failed = row == NULL;
        if (failed) break;
        Py_INCREF(row);
        failed = fill(&packing, row, &cells) || note_details(with_details, row, i);
        if (failed) uncount(rows, i);
        memcpy(PyBytes_AS_STRING(bytes) + i * (Py_ssize_t)sizeof cells, &cells, sizeof cells);
        Py_DECREF(row);
    }
    PyObject *answer = failed || PyErr_Occurred() ? NULL : PyTuple_Pack(2, bytes, with_details);
    Py_XDECREF(bytes);
    Py_XDECREF(with_details);
    return answer;
}

/* A column's name, offset, size, and whether it has a sign. */
#define HAS_SIGN(value) _Generic(value, long long: 1, unsigned long long: 0)
#define COLUMN(name) {#name, offsetof(Cells, name), sizeof((Cells){0}.name), HAS_SIGN((Cells){0}.name)}

/* The columns of `Cells` in order, for the test that compares its twin with it. */
static PyObject *row_layout(void) {
    const struct {
        const char *name;
        Py_ssize_t offset, size;
        int has_sign;
    } columns[] = {
        COLUMN(trace_high), COLUMN(trace_low), COLUMN(span_id), COLUMN(parent_id),
        COLUMN(stream), COLUMN(site), COLUMN(root), COLUMN(thread),
        COLUMN(sampled), COLUMN(host_start_ns), COLUMN(host_end_ns), COLUMN(gpu_start_ns),
        COLUMN(gpu_end_ns), COLUMN(uncertainty_ns), COLUMN(device), COLUMN(flags),
    };
    enum { COUNT = sizeof columns / sizeof *columns };
    _Static_assert(sizeof(Cells) == 8 * COUNT, "every column is here, and nothing between them");
    PyObject *layout = PyTuple_New(COUNT);
    for (Py_ssize_t i = 0; layout != NULL && i < COUNT; i++) {
        PyObject *sign = columns[i].has_sign ? Py_True : Py_False;
        PyObject *column = Py_BuildValue("(snnO)", columns[i].name, columns[i].offset, columns[i].size, sign);
        if (column == NULL) Py_CLEAR(layout);
        else PyTuple_SET_ITEM(layout, i, column);
    }
    return layout;
}

static PyMethodDef functions[] = {
    {"pack", pack, METH_VARARGS, "Return rows as the bytes of a batch's cells, and which have details."},
    {NULL},
};

int add_pack(PyObject *module) {
    str_calls = PyUnicode_InternFromString("calls");
    str_index = PyUnicode_InternFromString("index");
    str_raw = PyUnicode_InternFromString("raw");
    str_warms_up = PyUnicode_InternFromString("warms_up");
    str_warmup = PyUnicode_InternFromString("warmup");
    if (PyErr_Occurred() || PyModule_AddFunctions(module, functions)) return -1;
    PyObject *layout = row_layout();
    int failed = layout == NULL || PyModule_AddObjectRef(module, "ROW_LAYOUT", layout);
    Py_XDECREF(layout);
    return failed ? -1 : 0;
}
