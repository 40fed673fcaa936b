/*
 * A `with` block: a record that begins when it is entered and ends when it is left. The twin is `StageBlock` of
 * `_recording/block.py`.
 */
#include "native.h"

PyTypeObject *block_type;
static PyObject *str_enter_again, *str_exit_again, *str_enter, *str_enter_context, *str_set_uncommon;

static PyMemberDef members[] = {
    {"owner", T_OBJECT_EX, offsetof(StageBlock, owner), 0, NULL},
    {"stream", T_OBJECT, offsetof(StageBlock, stream), 0, NULL},
    {"uses", T_BYTE, offsetof(StageBlock, uses), 0, NULL},
    {NULL},
};

static int traverse(StageBlock *self, visitproc visit, void *arg) {
    Py_VISIT(self->owner);
    Py_VISIT(self->stream);
    return ((traverseproc)record_type->tp_traverse)((PyObject *)self, visit, arg);
}

static int clear(StageBlock *self) {
    Py_CLEAR(self->owner);
    Py_CLEAR(self->stream);
    return ((inquiry)record_type->tp_clear)((PyObject *)self);
}

static void dealloc(StageBlock *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Py_TRASHCAN_BEGIN(self, dealloc)
    clear(self);
    type->tp_free(self);
    Py_DECREF(type);
    Py_TRASHCAN_END
}

/* Whether what enters the block may be suspended before it leaves it; only NVTX asks. A function's code says so by its
   flags. One that enters on behalf of another (`ExitStack.enter_context`, somebody's `__enter__`) does not know. */
static PyObject *flags_of_caller(void) {
    PyFrameObject *frame = PyEval_GetFrame();
    if (frame == NULL) return PyLong_FromLong(0);
    PyCodeObject *code = PyFrame_GetCode(frame);
    int flags = code->co_flags & (CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR);
    if (code->co_name == str_enter_context || code->co_name == str_enter) flags = 1;
    Py_DECREF(code);
    return PyLong_FromLong(flags);
}

static PyObject *enter(StageBlock *self, PyObject *Py_UNUSED(ignored)) {
    StageRecord *record = &self->record;
    Recorder *recorder = as_recorder(record->recorder);
    if (recorder == NULL) return NULL;
    if (self->uses || recorder->paused) return PyObject_CallMethodNoArgs((PyObject *)self, str_enter_again);
    self->uses = 1;
    PyObject *suspends = is_present(recorder->nvtx) ? flags_of_caller() : PyLong_FromLong(0);
    if (suspends == NULL) return NULL;
    int failed = begin_stage(recorder, record, record->site, self->stream, suspends);
    Py_DECREF(suspends);
    return failed ? NULL : Py_NewRef((PyObject *)self);
}

static PyObject *leave(StageBlock *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "`__exit__` takes an exception's type, the exception and its traceback");
        return NULL;
    }
    if (self->uses != 1) return PyObject_CallMethodOneArg((PyObject *)self, str_exit_again, args[1]);
    if (end_stage(&self->record, args[1])) return NULL;
    Py_RETURN_NONE;
}

enum { SMALL_BYTES = 256, FEW = 32 }; /* As in `_recording/queue.py`. */

/* Whether the value is plain and needs no weighing: it never changes, refers to nothing, and is short. */
static int is_small(PyObject *value) {
    if (PyLong_CheckExact(value)) {
        int overflow;
        PyLong_AsLongLongAndOverflow(value, &overflow);
        return !overflow;
    }
    if (PyUnicode_CheckExact(value)) return PyUnicode_GET_LENGTH(value) < SMALL_BYTES;
    if (PyBytes_CheckExact(value)) return PyBytes_GET_SIZE(value) < SMALL_BYTES;
    return value == Py_None || PyFloat_CheckExact(value) || PyBool_Check(value);
}

/* set_attribute(key, value). Whatever is not small, and a call that is not plain, is left to Python. */
static PyObject *set_attribute(StageBlock *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    PyObject *attributes = self->record.attributes;
    if (names != NULL || count != 2 || !PyUnicode_CheckExact(args[0]) || !is_small(args[1]) ||
        (is_present(attributes) && (!PyDict_CheckExact(attributes) || PyDict_GET_SIZE(attributes) >= FEW))) {
        PyObject *uncommon = PyObject_GetAttr((PyObject *)self, str_set_uncommon);
        PyObject *result = uncommon == NULL ? NULL : PyObject_Vectorcall(uncommon, args, count, names);
        Py_XDECREF(uncommon);
        return result;
    }
    if (self->uses && self->record.end_ns) Py_RETURN_NONE;
    if (!is_present(attributes)) {
        attributes = PyDict_New();
        if (attributes == NULL) return NULL;
        put(&self->record.attributes, attributes);
    }
    if (PyDict_SetItem(attributes, args[0], args[1])) return NULL;
    Py_RETURN_NONE;
}

PyObject *make_block(PyTypeObject *type, PyObject *recorder, PyObject *site) {
    StageBlock *block = (StageBlock *)type->tp_alloc(type, 0);
    if (block == NULL) return NULL;
    block->record.recorder = Py_NewRef(recorder);
    block->record.site = Py_NewRef(site);
    return (PyObject *)block;
}

/* new_block(type, recorder, site): what `stage(name)` returns while recording is on. */
static PyObject *new_block(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count) {
    if (count != 3 || !PyType_Check(args[0]) || !PyType_IsSubtype((PyTypeObject *)args[0], block_type)) {
        PyErr_SetString(PyExc_TypeError, "new_block takes a subclass of StageBlock, a recorder and a site");
        return NULL;
    }
    return make_block((PyTypeObject *)args[0], args[1], args[2]);
}

static PyMethodDef methods[] = {
    {"__enter__", (PyCFunction)enter, METH_NOARGS, "Begin the stage."},
    {"__exit__", (PyCFunction)(void (*)(void))leave, METH_FASTCALL, "End the stage; an exception is noted and goes on."},
    {"set_attribute", (PyCFunction)(void (*)(void))set_attribute, METH_FASTCALL | METH_KEYWORDS,
     "set_attribute($self, /, key, value)\n--\n\nAdd an attribute to this run's host span, unless the run has ended."},
    {NULL},
};

static PyMethodDef functions[] = {
    {"new_block", (PyCFunction)(void (*)(void))new_block, METH_FASTCALL, "Return a block that is ready to be entered."},
    {NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "One `with stage(...)` block, which is its own record."},
    {Py_tp_members, members},
    {Py_tp_methods, methods},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_dealloc, dealloc},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "gpuscope._native.StageBlock",
    .basicsize = sizeof(StageBlock),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

int add_block(PyObject *module) {
    str_enter_again = PyUnicode_InternFromString("_enter_again");
    str_exit_again = PyUnicode_InternFromString("_exit_again");
    str_set_uncommon = PyUnicode_InternFromString("_set_uncommon");
    str_enter = PyUnicode_InternFromString("__enter__");
    str_enter_context = PyUnicode_InternFromString("enter_context");
    if (!str_enter_again || !str_exit_again || !str_set_uncommon || !str_enter || !str_enter_context) return -1;
    PyObject *bases = PyTuple_Pack(1, record_type);
    if (bases == NULL) return -1;
    block_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, bases);
    Py_DECREF(bases);
    if (block_type == NULL || PyModule_AddType(module, block_type)) return -1;
    return PyModule_AddFunctions(module, functions);
}
