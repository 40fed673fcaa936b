/*
 * The bytes of a batch's spans: templates with slices of each row's cells between them. The twin is
 * `_join_in_python` of `exporters/_encoding/otlp_bytes.py`.
 */
#include "native.h"

#include <string.h>

/* A template: `(before, host's slice, between, GPU's slice, after, ...)`. */
enum { BEFORE, HOST, BETWEEN, GPU, AFTER, TEMPLATE_SIZE };

/* How many slices a layout may have. */
enum { MAX_SLICES = 16 };

typedef struct {
    const char *cells;
    Py_ssize_t row_size, rows, slices;
    Py_ssize_t first[MAX_SLICES], last[MAX_SLICES];
} Layout;

static int read_slices(PyObject *slices, Layout *layout) {
    layout->slices = PyList_GET_SIZE(slices);
    if (layout->slices > MAX_SLICES) {
        PyErr_SetString(PyExc_ValueError, "too many slices: at most 16 are allowed");
        return -1;
    }
    for (Py_ssize_t i = 0; i < layout->slices; i++) {
        if (!PyArg_ParseTuple(PyList_GET_ITEM(slices, i), "nn", &layout->first[i], &layout->last[i])) return -1;
        if (layout->first[i] < 0 || layout->last[i] < layout->first[i] || layout->last[i] > layout->row_size) {
            PyErr_SetString(PyExc_ValueError, "a slice lies outside the row");
            return -1;
        }
    }
    return 0;
}

static int check(PyObject *template, const Layout *layout) {
    int right = PyTuple_CheckExact(template) && PyTuple_GET_SIZE(template) >= TEMPLATE_SIZE;
    for (int i = BEFORE; right && i < TEMPLATE_SIZE; i++) {
        PyObject *item = PyTuple_GET_ITEM(template, i);
        if (i == HOST || i == GPU) {
            Py_ssize_t slice = PyLong_Check(item) ? PyLong_AsSsize_t(item) : -1;
            right = slice >= 0 && slice < layout->slices;
        } else {
            right = PyBytes_CheckExact(item);
        }
    }
    if (!right && !PyErr_Occurred())
        PyErr_SetString(PyExc_TypeError, "a template must be a tuple that starts with bytes, slice, bytes, slice, bytes");
    return right ? 0 : -1;
}

static char *add_bytes(char *to, PyObject *bytes) {
    memcpy(to, PyBytes_AS_STRING(bytes), PyBytes_GET_SIZE(bytes));
    return to + PyBytes_GET_SIZE(bytes);
}

static char *add_slice(char *to, const Layout *layout, Py_ssize_t row, PyObject *which) {
    Py_ssize_t slice = PyLong_AsSsize_t(which), size = layout->last[slice] - layout->first[slice];
    memcpy(to, layout->cells + row * layout->row_size + layout->first[slice], size);
    return to + size;
}

/* How many bytes a template's row has; -1 and an exception for what is not a template. */
static Py_ssize_t size_of(PyObject *template, const Layout *layout) {
    if (check(template, layout)) return -1;
    Py_ssize_t size = 0;
    for (int i = BEFORE; i < TEMPLATE_SIZE; i++) {
        PyObject *item = PyTuple_GET_ITEM(template, i);
        Py_ssize_t slice = i == HOST || i == GPU ? PyLong_AsSsize_t(item) : -1;
        size += slice < 0 ? PyBytes_GET_SIZE(item) : layout->last[slice] - layout->first[slice];
    }
    return size;
}

static PyObject *joined(PyObject *templates, const Layout *layout) {
    Py_ssize_t total = 0;
    for (Py_ssize_t row = 0; row < layout->rows; row++) {
        Py_ssize_t size = size_of(PyList_GET_ITEM(templates, row), layout);
        if (size < 0) return NULL;
        total += size;
    }
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, total);
    if (bytes == NULL) return NULL;
    char *to = PyBytes_AS_STRING(bytes);
    for (Py_ssize_t row = 0; row < layout->rows; row++) {
        PyObject *template = PyList_GET_ITEM(templates, row);
        to = add_bytes(to, PyTuple_GET_ITEM(template, BEFORE));
        to = add_slice(to, layout, row, PyTuple_GET_ITEM(template, HOST));
        to = add_bytes(to, PyTuple_GET_ITEM(template, BETWEEN));
        to = add_slice(to, layout, row, PyTuple_GET_ITEM(template, GPU));
        to = add_bytes(to, PyTuple_GET_ITEM(template, AFTER));
    }
    return bytes;
}

/* join(cells, row_size, slices, templates): the rows' bytes, one after the other */
static PyObject *join(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_buffer cells;
    PyObject *slices, *templates, *bytes = NULL;
    Layout layout;
    if (!PyArg_ParseTuple(
            args, "y*nO!O!:join", &cells, &layout.row_size, &PyList_Type, &slices, &PyList_Type, &templates
        ))
        return NULL;
    layout.cells = cells.buf;
    layout.rows = PyList_GET_SIZE(templates);
    if (layout.row_size < 0 || (layout.row_size && layout.rows > cells.len / layout.row_size))
        PyErr_SetString(PyExc_ValueError, "there are fewer rows than templates");
    else if (!read_slices(slices, &layout))
        bytes = joined(templates, &layout);
    PyBuffer_Release(&cells);
    return bytes;
}

static PyMethodDef functions[] = {
    {"join", join, METH_VARARGS, "Return rows as bytes, by templates."},
    {NULL},
};

int add_join(PyObject *module) { return PyModule_AddFunctions(module, functions); }
