/*
 * What a program calls: `stage`. The twins are in `_recording/stage.py` and `_recording/state.py`; `NoopBlock`'s is
 * `DisabledStage` of `_recording/block.py`.
 *
 * While nothing is recorded, a call here looks at the recorder and returns. Whatever is not common is left to the twin.
 */
#include "native.h"

#include <stdint.h>

/* What the hot path looks at: the attributes of `State` that are read here. */
typedef struct {
    PyObject_HEAD
    PyObject *recorder, *off_stages;
} StateFields;

static PyTypeObject *state_type, *shortcut_type, *noop_type, *binder_type;

static PyMemberDef state_members[] = {
    {"recorder", T_OBJECT_EX, offsetof(StateFields, recorder), 0, NULL},
    {"off_stages", T_OBJECT_EX, offsetof(StateFields, off_stages), 0, NULL},
    {NULL},
};

static int traverse_state(StateFields *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->recorder);
    Py_VISIT(self->off_stages);
    return 0;
}

static int clear_state(StateFields *self) {
    Py_CLEAR(self->recorder);
    Py_CLEAR(self->off_stages);
    return 0;
}

static void free_state(StateFields *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear_state(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot state_slots[] = {
    {Py_tp_doc, "What the hot path looks at."},
    {Py_tp_members, state_members},
    {Py_tp_traverse, traverse_state},
    {Py_tp_clear, clear_state},
    {Py_tp_dealloc, free_state},
    {0, NULL},
};

static PyType_Spec state_spec = {
    .name = "gpuscope._native.StateFields",
    .basicsize = sizeof(StateFields),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = state_slots,
};

/* ---- NoopBlock: what `stage` hands out while nothing is recorded */

typedef struct {
    PyObject_HEAD
    PyObject *enter; /* Its own `__enter__`, of a block that is kept: to bind one costs as much as the rest of a block. */
} NoopBlock;

static PyObject *enter_noop(PyObject *self, PyObject *Py_UNUSED(ignored)) { return Py_NewRef(self); }

static PyObject *leave_noop(PyObject *Py_UNUSED(self), PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(count)) {
    Py_RETURN_NONE;
}

static PyMethodDef enter_method = {"__enter__", enter_noop, METH_NOARGS, "Do nothing."};
/* In the class as it is, and never bound, because it needs no block. */
static PyMethodDef leave_function = {"__exit__", (PyCFunction)(void (*)(void))leave_noop, METH_FASTCALL, "Do nothing."};

static int traverse_noop(NoopBlock *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->enter);
    return 0;
}

static int clear_noop(NoopBlock *self) {
    Py_CLEAR(self->enter);
    return 0;
}

static void free_noop(NoopBlock *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear_noop(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot noop_slots[] = {
    {Py_tp_doc, "A context manager that does nothing."},
    {Py_tp_traverse, traverse_noop},
    {Py_tp_clear, clear_noop},
    {Py_tp_dealloc, free_noop},
    {0, NULL},
};

static PyType_Spec noop_spec = {
    .name = "gpuscope._native.NoopBlock",
    .basicsize = sizeof(NoopBlock),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = noop_slots,
};

/* keep(block): for one that is handed out again and again, and never let go, because it refers to itself from now on. */
static PyObject *keep(PyObject *Py_UNUSED(module), PyObject *block) {
    if (!PyObject_TypeCheck(block, noop_type)) return PyErr_Format(PyExc_TypeError, "expected a NoopBlock, got %R", block);
    PyObject *enter = PyCFunction_New(&enter_method, block);
    if (enter == NULL) return NULL;
    put(&((NoopBlock *)block)->enter, enter);
    Py_RETURN_NONE;
}

/* What stands in the class for `__enter__`: Python's own descriptor of the method, and what is kept of it by blocks. */
typedef struct {
    PyObject_HEAD
    PyObject *method;
} Binder;

static PyObject *bind(Binder *self, PyObject *block, PyObject *Py_UNUSED(type)) {
    if (block == NULL || block == Py_None) return Py_NewRef(self->method);
    if (!PyObject_TypeCheck(block, noop_type)) return PyErr_Format(PyExc_TypeError, "expected a NoopBlock, got %R", block);
    PyObject *enter = ((NoopBlock *)block)->enter;
    return enter != NULL ? Py_NewRef(enter) : PyCFunction_New(&enter_method, block);
}

static void free_binder(Binder *self) {
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(self->method);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot binder_slots[] = {
    {Py_tp_doc, "Finds a block's method."},
    {Py_tp_descr_get, bind},
    {Py_tp_dealloc, free_binder},
    {0, NULL},
};

static PyType_Spec binder_spec = {
    .name = "gpuscope._native.Binder",
    .basicsize = sizeof(Binder),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = binder_slots,
};

static int add_methods_of_noop(void) {
    Binder *binder = (Binder *)binder_type->tp_alloc(binder_type, 0);
    if (binder == NULL) return -1;
    binder->method = PyDescr_NewMethod(noop_type, &enter_method);
    PyObject *leave = PyCFunction_New(&leave_function, NULL), *type = (PyObject *)noop_type;
    int failed = binder->method == NULL || leave == NULL || PyObject_SetAttrString(type, "__enter__", (PyObject *)binder) ||
                 PyObject_SetAttrString(type, "__exit__", leave);
    Py_XDECREF(leave);
    Py_DECREF(binder);
    return failed ? -1 : 0;
}

/* ---- Shortcut */

enum { NAMES = 64 }; /* A power of 2. */

/* A function of Python whose common calls are done here. Its class, which is made in Python, has a `__call__` of Python's
   as well. No call gets there but those that Dynamo traces, which can't trace what is here. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *function, *sites;
    PyTypeObject *block;
    StateFields *state;
    /* What names have led to, by the identities of the name and of the table of stages, in which nothing is replaced. What
       is no longer true is left behind with the whole table. */
    struct {
        PyObject *name, *table, *found;
    } names[NAMES];
} Shortcut;

static int traverse_shortcut(Shortcut *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->function);
    Py_VISIT(self->sites);
    Py_VISIT(self->block);
    Py_VISIT(self->state);
    for (int i = 0; i < NAMES; i++) {
        Py_VISIT(self->names[i].table);
        Py_VISIT(self->names[i].found);
    }
    return 0;
}

static PyObject *call_cleared(Shortcut *self, PyObject *const *Py_UNUSED(args), size_t Py_UNUSED(count),
                              PyObject *Py_UNUSED(names)) {
    return PyErr_Format(PyExc_TypeError, "%R has been taken apart by the garbage collector", Py_TYPE(self));
}

static int clear_shortcut(Shortcut *self) {
    self->call = (vectorcallfunc)(void (*)(void))call_cleared;
    Py_CLEAR(self->function);
    Py_CLEAR(self->sites);
    Py_CLEAR(self->block);
    Py_CLEAR(self->state);
    for (int i = 0; i < NAMES; i++) {
        Py_CLEAR(self->names[i].name);
        Py_CLEAR(self->names[i].table);
        Py_CLEAR(self->names[i].found);
    }
    return 0;
}

static void free_shortcut(Shortcut *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear_shortcut(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static void remember(Shortcut *self, uintptr_t i, PyObject *name, PyObject *table, PyObject *found) {
    PyObject *before[] = {self->names[i].name, self->names[i].table, self->names[i].found};
    self->names[i].name = Py_NewRef(name);
    self->names[i].table = Py_NewRef(table);
    self->names[i].found = Py_NewRef(found);
    for (int each = 0; each < 3; each++) Py_XDECREF(before[each]);
}

/* A new reference; null where the name is not in the table, perhaps with an exception. */
static PyObject *find_off_stage(Shortcut *self, uintptr_t i, PyObject *name) {
    PyObject *table = self->state->off_stages;
    if (table == NULL || !PyDict_CheckExact(table)) return NULL;
    /* A key may be of a subclass, with methods of its own. */
    Py_INCREF(table);
    PyObject *found = Py_XNewRef(PyDict_GetItemWithError(table, name));
    if (found != NULL) remember(self, i, name, table, found);
    Py_DECREF(table);
    return found;
}

static PyObject *new_stage(Shortcut *self, PyObject *recorder, PyObject *name) {
    Py_INCREF(recorder);
    PyObject *site = Py_XNewRef(PyDict_GetItemWithError(self->sites, name));
    PyObject *block = site == NULL ? NULL : make_block(self->block, recorder, site);
    Py_XDECREF(site);
    Py_DECREF(recorder);
    return block;
}

/* stage(name): the stage that is recorded, or the one that is not. The first use of a name is left to the twin. */
static PyObject *call_stage(Shortcut *self, PyObject *const *args, size_t count, PyObject *names) {
    if (PyVectorcall_NARGS(count) != 1 || names != NULL) return PyObject_Vectorcall(self->function, args, count, names);
    PyObject *recorder = self->state->recorder, *stage = NULL;
    uintptr_t address = (uintptr_t)args[0], i = (address >> 4 ^ address >> 10) & (NAMES - 1);
    if (recorder == Py_None && self->names[i].name == args[0] && self->names[i].table == self->state->off_stages)
        return Py_NewRef(self->names[i].found);
    if (recorder != NULL && PyUnicode_CheckExact(args[0])) {
        stage = recorder == Py_None ? find_off_stage(self, i, args[0]) : new_stage(self, recorder, args[0]);
        if (stage != NULL || PyErr_Occurred()) return stage;
    }
    return PyObject_Vectorcall(self->function, args, count, names);
}

/* Shortcut(function, state, sites, block): `stage`. */
static PyObject *new_shortcut(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *function, *state, *sites, *block;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) != 0) return PyErr_Format(PyExc_TypeError, "Shortcut takes no keywords");
    if (!PyArg_ParseTuple(args, "OO!O!O!:Shortcut", &function, state_type, &state, &PyDict_Type, &sites, &PyType_Type, &block))
        return NULL;
    if (!PyCallable_Check(function) || !PyType_IsSubtype((PyTypeObject *)block, block_type)) {
        PyErr_SetString(PyExc_TypeError, "Shortcut takes a function, a state, a table of sites and a StageBlock");
        return NULL;
    }
    Shortcut *self = (Shortcut *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    self->call = (vectorcallfunc)(void (*)(void))call_stage;
    self->function = Py_NewRef(function);
    self->state = (StateFields *)Py_NewRef(state);
    self->sites = Py_NewRef(sites);
    self->block = (PyTypeObject *)Py_NewRef(block);
    /* Python takes it from a class that has a `__call__` of its own. */
    type->tp_flags |= Py_TPFLAGS_HAVE_VECTORCALL;
    return (PyObject *)self;
}

static PyMemberDef shortcut_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Shortcut, call), READONLY, NULL},
    {NULL},
};

static PyType_Slot shortcut_slots[] = {
    {Py_tp_doc, "A function whose common calls are done in C."},
    {Py_tp_new, new_shortcut},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_members, shortcut_members},
    {Py_tp_traverse, traverse_shortcut},
    {Py_tp_clear, clear_shortcut},
    {Py_tp_dealloc, free_shortcut},
    {0, NULL},
};

static PyType_Spec shortcut_spec = {
    .name = "gpuscope._native.Shortcut",
    .basicsize = sizeof(Shortcut),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .slots = shortcut_slots,
};

static PyMethodDef functions[] = {
    {"keep", keep, METH_O, "Prepare a NoopBlock that is never let go."},
    {NULL},
};

int add_calls(PyObject *module) {
    if (add_type(module, &state_spec, &state_type) || add_type(module, &noop_spec, &noop_type)) return -1;
    if (add_type(module, &binder_spec, &binder_type) || add_methods_of_noop()) return -1;
    return add_type(module, &shortcut_spec, &shortcut_type) ? -1 : PyModule_AddFunctions(module, functions);
}
