/*
 * What takes part in many batches: their tokens, and that they join one more. The twins are in
 * `_recording/batches/summed.py` and `_recording/batches/members.py`.
 *
 * Knows no batch: which members one has is read in Python.
 */
#include "native.h"

/* `SummedFields` of `_recording/batches/summed.py`, and the number of the last batch that it joined. */
typedef struct {
    PyObject_HEAD
    PyObject *token;
    long long steps, joined;
    char ended;
} Summed;

static PyTypeObject *summed_type;
static long long batches;

static PyMemberDef members[] = {
    {"token", T_OBJECT_EX, offsetof(Summed, token), 0, NULL},
    {"steps", T_LONGLONG, offsetof(Summed, steps), 0, NULL},
    {"ended", T_BOOL, offsetof(Summed, ended), 0, NULL},
    {NULL},
};

static int traverse(Summed *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->token);
    return 0;
}

static int clear(Summed *self) {
    Py_CLEAR(self->token);
    return 0;
}

static void dealloc(Summed *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot slots[] = {
    {Py_tp_doc, "What takes part in many batches, as far as each of them needs it."},
    {Py_tp_members, members},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_dealloc, dealloc},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "gpuscope._native.SummedFields",
    .basicsize = sizeof(Summed),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

static Summed *as_summed(PyObject *object) {
    return PyType_IsSubtype(Py_TYPE(object), summed_type) ? (Summed *)object : NULL;
}

/* tokens_of(tuple): the token of each item; None if one of them is not summed. */
static PyObject *tokens_of(PyObject *Py_UNUSED(module), PyObject *items) {
    if (!PyTuple_CheckExact(items)) return PyErr_Format(PyExc_TypeError, "expected a tuple, got %R", Py_TYPE(items));
    PyObject *tokens = PyTuple_New(PyTuple_GET_SIZE(items));
    if (tokens == NULL) return NULL;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items); i++) {
        Summed *summed = as_summed(PyTuple_GET_ITEM(items, i));
        if (summed == NULL || summed->token == NULL) {
            Py_DECREF(tokens);
            Py_RETURN_NONE;
        }
        PyTuple_SET_ITEM(tokens, i, Py_NewRef(summed->token));
    }
    return tokens;
}

static PyObject *join(Summed *summed) {
    if (summed == NULL || summed->ended || summed->joined == batches) Py_RETURN_NONE;
    summed->joined = batches;
    return PyLong_FromLongLong(summed->steps++);
}

/* joined(tuple): of each item which of its batches this is, from 0; None of one that is not summed, has ended, or was
   there before; and None if there is no other. */
static PyObject *joined(PyObject *Py_UNUSED(module), PyObject *items) {
    if (!PyTuple_CheckExact(items)) return PyErr_Format(PyExc_TypeError, "expected a tuple, got %R", Py_TYPE(items));
    PyObject *found = PyTuple_New(PyTuple_GET_SIZE(items));
    if (found == NULL) return NULL;
    batches++;
    int any = 0;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items); i++) {
        PyObject *step = join(as_summed(PyTuple_GET_ITEM(items, i)));
        if (step == NULL) {
            Py_DECREF(found);
            return NULL;
        }
        any |= step != Py_None;
        PyTuple_SET_ITEM(found, i, step);
    }
    if (any) return found;
    Py_DECREF(found);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"tokens_of", tokens_of, METH_O, "The tokens of what is summed, or None."},
    {"joined", joined, METH_O, "Note that what is summed joins one more batch."},
    {NULL},
};

int add_summed(PyObject *module) {
    summed_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    if (summed_type == NULL || PyModule_AddType(module, summed_type)) return -1;
    return PyModule_AddFunctions(module, functions);
}
