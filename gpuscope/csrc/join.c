/*
 * The bytes of a batch's spans: which rows are of one group, and templates with the rows' numbers between them. The
 * twins are `_grouped_in_python` of `exporters/_encoding/spans.py` and `_join_in_python` of
 * `exporters/_encoding/otlp_bytes.py`.
 *
 * Visits the rows without the GIL.
 */
#include "native.h"

#include <stdint.h>
#include <string.h>

/* A template: `(before, host's slice, between, GPU's slice, after, ...)`. */
enum { BEFORE, HOST, BETWEEN, GPU, AFTER, TEMPLATE_SIZE };

/* How many slices and columns a layout may have. */
enum { MAX_SLICES = 16, MAX_COLUMNS = 32, NUMBER_SIZE = 8 };

typedef struct {
    Py_ssize_t at;
    int swaps;
    Py_buffer values;
} Column;

typedef struct {
    const char *row;
    Py_ssize_t row_size, rows, slices, columns;
    Py_ssize_t first[MAX_SLICES], last[MAX_SLICES];
    Column column[MAX_COLUMNS];
} Layout;

typedef struct {
    const char *bytes[TEMPLATE_SIZE];
    Py_ssize_t length[TEMPLATE_SIZE], slice[TEMPLATE_SIZE], size;
} Template;

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

/* Each column is `(offset in the row, whether its bytes are swapped, an array of numbers of eight bytes)`. */
static int read_columns(PyObject *columns, Layout *layout) {
    Py_ssize_t count = PyList_GET_SIZE(columns);
    if (count > MAX_COLUMNS) PyErr_SetString(PyExc_ValueError, "too many columns: at most 32 are allowed");
    for (Py_ssize_t i = 0; i < count && !PyErr_Occurred(); i++) {
        Column *column = &layout->column[i];
        PyObject *values;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(columns, i), "npO", &column->at, &column->swaps, &values)) break;
        if (PyObject_GetBuffer(values, &column->values, PyBUF_C_CONTIGUOUS)) break;
        layout->columns = i + 1;
        if (column->values.len < layout->rows * NUMBER_SIZE || column->values.itemsize != NUMBER_SIZE)
            PyErr_SetString(PyExc_ValueError, "a column must have a number of eight bytes for each row");
        if (column->at < 0 || column->at > layout->row_size - NUMBER_SIZE)
            PyErr_SetString(PyExc_ValueError, "a column lies outside the row");
    }
    return PyErr_Occurred() ? -1 : 0;
}

static int read_template(PyObject *template, const Layout *layout, Template *read) {
    int right = PyTuple_CheckExact(template) && PyTuple_GET_SIZE(template) >= TEMPLATE_SIZE;
    read->size = 0;
    for (int i = BEFORE; right && i < TEMPLATE_SIZE; i++) {
        PyObject *item = PyTuple_GET_ITEM(template, i);
        if (i == HOST || i == GPU) {
            Py_ssize_t slice = read->slice[i] = PyLong_Check(item) ? PyLong_AsSsize_t(item) : -1;
            right = slice >= 0 && slice < layout->slices;
            if (right) read->length[i] = layout->last[slice] - layout->first[slice];
        } else if ((right = PyBytes_CheckExact(item))) {
            read->bytes[i] = PyBytes_AS_STRING(item);
            read->length[i] = PyBytes_GET_SIZE(item);
        }
        if (right) read->size += read->length[i];
    }
    if (!right && !PyErr_Occurred())
        PyErr_SetString(PyExc_TypeError, "a template must be a tuple that starts with bytes, slice, bytes, slice, bytes");
    return right ? 0 : -1;
}

/* To be freed by `PyMem_Free`. Null and an exception for what are not templates. */
static Template *read_templates(PyObject *templates, const Layout *layout) {
    Py_ssize_t count = PyTuple_GET_SIZE(templates);
    Template *all = PyMem_Calloc(count ? count : 1, sizeof *all);
    if (all == NULL) return (Template *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) {
        if (read_template(PyTuple_GET_ITEM(templates, i), layout, &all[i])) {
            PyMem_Free(all);
            return NULL;
        }
    }
    return all;
}

static char *add_slice(char *to, const Layout *layout, Py_ssize_t row, Py_ssize_t slice) {
    Py_ssize_t first = layout->first[slice], last = layout->last[slice];
    memcpy(to, layout->row + first, last - first);
    for (Py_ssize_t i = 0; i < layout->columns; i++) {
        const Column *column = &layout->column[i];
        if (column->at < first || column->at > last - NUMBER_SIZE) continue;
        uint64_t number;
        memcpy(&number, (const char *)column->values.buf + row * NUMBER_SIZE, NUMBER_SIZE);
        if (column->swaps) number = __builtin_bswap64(number);
        memcpy(to + column->at - first, &number, NUMBER_SIZE);
    }
    return to + (last - first);
}

static void fill(char *to, const Layout *layout, const Template *templates, const int32_t *groups) {
    for (Py_ssize_t row = 0; row < layout->rows; row++) {
        const Template *template = &templates[groups[row]];
        for (int i = BEFORE; i < TEMPLATE_SIZE; i++) {
            if (i == HOST || i == GPU) {
                to = add_slice(to, layout, row, template->slice[i]);
            } else {
                memcpy(to, template->bytes[i], template->length[i]);
                to += template->length[i];
            }
        }
    }
}

/* The bytes of all rows; -1: a group has no template. */
static Py_ssize_t size_of(const Layout *layout, const Template *templates, Py_ssize_t count, const int32_t *groups) {
    Py_ssize_t total = 0;
    for (Py_ssize_t row = 0; row < layout->rows; row++) {
        if (groups[row] < 0 || groups[row] >= count) return -1;
        total += templates[groups[row]].size;
    }
    return total;
}

static PyObject *joined(PyObject *templates, const Layout *layout, const int32_t *groups) {
    Template *all = read_templates(templates, layout);
    if (all == NULL) return NULL;
    PyObject *bytes = NULL;
    Py_ssize_t total = size_of(layout, all, PyTuple_GET_SIZE(templates), groups);
    if (total < 0) PyErr_SetString(PyExc_ValueError, "a row's group has no template");
    else bytes = PyBytes_FromStringAndSize(NULL, total);
    if (bytes != NULL) {
        char *to = PyBytes_AS_STRING(bytes);
        Py_BEGIN_ALLOW_THREADS
        fill(to, layout, all, groups);
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(all);
    return bytes;
}

/*
 * join(row, slices, columns, templates, groups)
 *
 * The rows' bytes, one after the other. Each has the template of its group, a number of 32 bits.
 */
static PyObject *join(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_buffer groups;
    PyObject *slices, *columns, *list, *bytes = NULL;
    Layout layout = {0};
    if (!PyArg_ParseTuple(
            args, "y#O!O!O!y*:join", &layout.row, &layout.row_size, &PyList_Type, &slices, &PyList_Type, &columns,
            &PyList_Type, &list, &groups
        ))
        return NULL;
    /* A tuple, which nobody changes meanwhile. */
    PyObject *templates = PyList_AsTuple(list);
    layout.rows = groups.len / (Py_ssize_t)sizeof(int32_t);
    if (templates != NULL && !read_slices(slices, &layout) && !read_columns(columns, &layout))
        bytes = joined(templates, &layout, groups.buf);
    for (Py_ssize_t i = 0; i < layout.columns; i++) PyBuffer_Release(&layout.column[i].values);
    Py_XDECREF(templates);
    PyBuffer_Release(&groups);
    return bytes;
}

static uint64_t hash_of(const unsigned char *key, Py_ssize_t size) {
    uint64_t hash = 14695981039346656037u, part;
    for (; size >= NUMBER_SIZE; key += NUMBER_SIZE, size -= NUMBER_SIZE) {
        memcpy(&part, key, NUMBER_SIZE);
        hash = (hash ^ part) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 29;
    }
    for (; size > 0; key++, size--) hash = (hash ^ *key) * 1099511628211u;
    return hash ^ hash >> 32;
}

/*
 * Numbers the groups in the order of their first rows, which `firsts` becomes; `table` has room for twice the rows, is
 * as large as `mask` says, and is -1 everywhere. Returns how many there are.
 */
static Py_ssize_t number(
    const unsigned char *keys, Py_ssize_t size, Py_ssize_t rows, int32_t *table, uint64_t mask, int32_t *groups,
    int32_t *firsts
) {
    Py_ssize_t count = 0;
    for (Py_ssize_t row = 0; row < rows; row++) {
        const unsigned char *key = keys + row * size;
        uint64_t place = hash_of(key, size) & mask;
        while (table[place] >= 0 && memcmp(keys + firsts[table[place]] * size, key, size)) place = (place + 1) & mask;
        if (table[place] < 0) {
            firsts[count] = (int32_t)row;
            table[place] = (int32_t)count++;
        }
        groups[row] = table[place];
    }
    return count;
}

static PyObject *keys_at(const unsigned char *keys, Py_ssize_t size, const int32_t *firsts, Py_ssize_t count) {
    PyObject *found = PyList_New(count);
    for (Py_ssize_t i = 0; found != NULL && i < count; i++) {
        PyObject *key = PyBytes_FromStringAndSize((const char *)keys + firsts[i] * size, size);
        if (key == NULL) Py_CLEAR(found);
        else PyList_SET_ITEM(found, i, key);
    }
    return found;
}

/* group(keys, size): the different keys among those of so many bytes, and each one's number, as a bytearray. */
static PyObject *group(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_buffer keys;
    Py_ssize_t size;
    PyObject *answer = NULL;
    if (!PyArg_ParseTuple(args, "y*n:group", &keys, &size)) return NULL;
    Py_ssize_t rows = size > 0 ? keys.len / size : 0, room = 2;
    while (room < 2 * rows) room *= 2;
    PyObject *groups = PyByteArray_FromStringAndSize(NULL, rows * (Py_ssize_t)sizeof(int32_t));
    int32_t *table = PyMem_Malloc((room + rows + 1) * sizeof *table), *firsts = table + room;
    if (size <= 0 || rows > INT32_MAX) PyErr_SetString(PyExc_ValueError, "keys have a size, and there are not too many");
    else if (groups == NULL || table == NULL) PyErr_NoMemory();
    else {
        int32_t *to = (int32_t *)PyByteArray_AS_STRING(groups);
        Py_ssize_t count;
        Py_BEGIN_ALLOW_THREADS
        memset(table, -1, room * sizeof *table);
        count = number(keys.buf, size, rows, table, (uint64_t)room - 1, to, firsts);
        Py_END_ALLOW_THREADS
        PyObject *found = keys_at(keys.buf, size, firsts, count);
        if (found != NULL) answer = Py_BuildValue("NO", found, groups);
    }
    PyMem_Free(table);
    Py_XDECREF(groups);
    PyBuffer_Release(&keys);
    return answer;
}

static PyMethodDef functions[] = {
    {"join", join, METH_VARARGS, "Return rows as bytes, by templates."},
    {"group", group, METH_VARARGS, "Return the different keys, and each row's number among them."},
    {NULL},
};

int add_join(PyObject *module) { return PyModule_AddFunctions(module, functions); }
