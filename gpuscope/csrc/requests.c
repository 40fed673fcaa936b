/*
 * Which request each row belongs to, in one pass over the rows. The twin is `keys_in_python` of
 * `_collecting/keeping/requests.py`. Calls nothing in Python, so that it may borrow all it looks at.
 */
#include "native.h"

static const Trace *trace_of(const StageRecord *record) {
    return record->trace && PyObject_TypeCheck(record->trace, trace_type) ? (const Trace *)record->trace : NULL;
}

/* The outermost stage around this one in its trace, also where the application's spans lie between. */
static const StageRecord *outermost(const StageRecord *record) {
    const Trace *trace = trace_of(record);
    while (trace != NULL && is_present(record->outer) && PyObject_TypeCheck(record->outer, record_type)) {
        const StageRecord *outer = (const StageRecord *)record->outer;
        const Trace *above = trace_of(outer);
        if (above == NULL || (above != trace && (above->high != trace->high || above->low != trace->low))) break;
        record = outer;
        trace = above;
    }
    return record;
}

static PyObject *request_keys(PyObject *Py_UNUSED(module), PyObject *rows) {
    if (!PyList_CheckExact(rows)) {
        PyErr_SetString(PyExc_TypeError, "the rows must be a list");
        return NULL;
    }
    Py_ssize_t count = PyList_GET_SIZE(rows);
    PyObject *keys = PyBytes_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof(unsigned long long));
    PyObject *roots = keys == NULL ? NULL : PyBytes_FromStringAndSize(NULL, count);
    for (Py_ssize_t i = 0; roots != NULL && i < count; i++) {
        PyObject *row = PyList_GET_ITEM(rows, i);
        PyObject *first = PyTuple_CheckExact(row) && PyTuple_GET_SIZE(row) ? PyTuple_GET_ITEM(row, 0) : NULL;
        if (first == NULL || !PyObject_TypeCheck(first, record_type)) {
            PyErr_SetString(PyExc_TypeError, "a row must be a tuple that begins with a StageRecord");
            Py_CLEAR(roots);
            break;
        }
        const StageRecord *record = (const StageRecord *)first, *top = outermost(record);
        const Trace *trace = trace_of(top);
        int is_request = trace != NULL && trace->root == top->site;
        unsigned long long key = is_request ? top->span_id : 0;
        memcpy(PyBytes_AS_STRING(keys) + i * (Py_ssize_t)sizeof key, &key, sizeof key);
        PyBytes_AS_STRING(roots)[i] = (char)(is_request && top == record);
    }
    PyObject *answer = roots == NULL ? NULL : PyTuple_Pack(2, keys, roots);
    Py_XDECREF(keys);
    Py_XDECREF(roots);
    return answer;
}

static PyMethodDef functions[] = {
    {"request_keys", request_keys, METH_O, "Return the keys of the rows' requests, and which rows are outermost stages."},
    {NULL, NULL, 0, NULL},
};

int add_requests(PyObject *module) { return PyModule_AddFunctions(module, functions); }
