/*
 * `here`: a token of where the calling code is in its trace. The twin is in
 * `_recording/batches/token.py`.
 *
 * Finds the current stage, where the application's context says nothing else; what it may say is asked in Python.
 */
#include "native.h"

PyTypeObject *fields_type;
static PyTypeObject *here_type;
/* What `prepare_tokens` and `know_spans` gave. */
static PyTypeObject *token_type;
static PyObject *is_off, *is_nowhere, *failed, *span_key, *lazy_type, *no_span;

enum { VALID = 5 };
static PyObject *str_here, *str_attached, *str_recorder, *str_get_span_context, *str_is_valid;

static PyMemberDef members[] = {
    {"_made_of", T_OBJECT_EX, offsetof(Token, source), READONLY, NULL},
    {"time_ns", T_LONGLONG, offsetof(Token, time_ns), READONLY, NULL},
    {NULL},
};

static int traverse(Token *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->source);
    return 0;
}

static int clear(Token *self) {
    Py_CLEAR(self->source);
    return 0;
}

static void dealloc(Token *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot slots[] = {
    {Py_tp_doc, "Where a request is, and when that was asked."},
    {Py_tp_members, members},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_dealloc, dealloc},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "gpuscope._native.TokenFields",
    .basicsize = sizeof(Token),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

static PyObject *make(PyTypeObject *type, PyObject *source, long long time_ns) {
    Token *token = (Token *)type->tp_alloc(type, 0);
    if (token == NULL) return NULL;
    token->source = Py_NewRef(source);
    token->time_ns = time_ns;
    return (PyObject *)token;
}

/* new_token(type, source, time_ns) */
static PyObject *new_token(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *type, *source;
    long long time_ns;
    if (!PyArg_ParseTuple(args, "O!OL:new_token", &PyType_Type, &type, &source, &time_ns)) return NULL;
    if (PyType_IsSubtype((PyTypeObject *)type, fields_type)) return make((PyTypeObject *)type, source, time_ns);
    return PyErr_Format(PyExc_TypeError, "expected a subclass of TokenFields, got %R", type);
}

/* Of a stage: 1: it was put into this context, so that nothing is in between; 0: into another one; -1: into none. */
static int stands_in(StageRecord *record, PyObject *context) {
    if (!is_present(record->span)) return -1;
    PyObject *attached = PyObject_GetAttr(record->span, str_attached);
    int answer = attached == context;
    if (attached == NULL) PyErr_Clear();
    if (!is_present(attached)) answer = -1;
    Py_XDECREF(attached);
    return answer;
}

/* What knows best where this is, or None; null and an exception on failure. */
static PyObject *ask(Recorder *recorder, PyObject *stage) {
    PyObject *bridge = Py_XNewRef(recorder->bridge);
    PyObject *source = is_present(bridge) ? PyObject_CallMethodOneArg(bridge, str_here, stage) : Py_NewRef(stage);
    Py_XDECREF(bridge);
    return source;
}

/* The ids of the application's own span in a context, or null: without an exception where Python has to be asked. */
static PyObject *ids_in(PyObject *context) {
    PyObject *span = PyDict_Check(context) && span_key != NULL ? PyDict_GetItemWithError(context, span_key) : NULL;
    if (span == NULL || span == no_span || (PyObject *)Py_TYPE(span) == lazy_type) return NULL;
    Py_INCREF(span);
    PyObject *ids = PyObject_CallMethodNoArgs(span, str_get_span_context);
    Py_DECREF(span);
    /* A `SpanContext` is a tuple whose last item is the answer; whatever else it is, it is asked. */
    PyObject *valid = NULL;
    if (ids != NULL && PyTuple_Check(ids) && PyTuple_GET_SIZE(ids) == VALID + 1) valid = Py_NewRef(PyTuple_GET_ITEM(ids, VALID));
    else if (ids != NULL) valid = PyObject_GetAttr(ids, str_is_valid);
    if (valid != Py_True) Py_CLEAR(ids);
    Py_XDECREF(valid);
    return ids;
}

/* As `ask`, but for what is common. */
static PyObject *source_of(Recorder *recorder, PyObject *stage) {
    PyObject *get = Py_XNewRef(recorder->current_context);
    if (!is_present(recorder->look_for_provider) || !is_present(get)) {
        Py_XDECREF(get);
        return Py_NewRef(stage);
    }
    PyObject *context = PyObject_CallNoArgs(get), *source = NULL;
    Py_DECREF(get);
    if (context == NULL) return NULL;
    int stands = stage == Py_None ? 0 : stands_in((StageRecord *)stage, context);
    int is_empty = PyDict_Check(context) && PyDict_GET_SIZE(context) == 0;
    if (stands > 0 || (stands < 0 && is_empty) || (stage == Py_None && is_empty)) {
        source = Py_NewRef(stage);
    } else if (stage == Py_None || (stands == 0 && ((StageRecord *)stage)->end_ns == 0)) {
        source = ids_in(context);
    }
    Py_DECREF(context);
    return source != NULL || PyErr_Occurred() ? source : ask(recorder, stage);
}

static PyObject *token_here(PyObject *object) {
    if (object == Py_None) return Py_NewRef(is_off);
    Recorder *recorder = as_recorder(object);
    PyObject *stage = NULL, *token = NULL;
    long long now_ns;
    if (recorder == NULL || stage_here(recorder, &stage)) return NULL;
    PyObject *source = source_of(recorder, stage);
    Py_DECREF(stage);
    if (source == Py_None) token = Py_NewRef(is_nowhere);
    else if (source != NULL && !read_now(recorder, &now_ns)) token = make(token_type, source, now_ns);
    Py_XDECREF(source);
    return token;
}

/* ---- HereShortcut: `here`. Its class, made in Python, has a `__call__` for Dynamo, as that of `Shortcut` in `calls.c`. */

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *state;
} HereShortcut;

static PyObject *call_here(HereShortcut *self, PyObject *const *Py_UNUSED(args), size_t count, PyObject *names) {
    if (PyVectorcall_NARGS(count) != 0 || names != NULL || self->state == NULL || token_type == NULL)
        return PyErr_Format(PyExc_TypeError, "`here` takes no arguments");
    PyObject *recorder = PyObject_GetAttr(self->state, str_recorder);
    PyObject *token = recorder == NULL ? NULL : token_here(recorder);
    Py_XDECREF(recorder);
    if (token != NULL) return token;
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (traceback != NULL) PyException_SetTraceback(error, traceback);
    token = PyObject_CallOneArg(failed, error);
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
    return token;
}

static int traverse_here(HereShortcut *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->state);
    return 0;
}

static int clear_here(HereShortcut *self) {
    Py_CLEAR(self->state);
    return 0;
}

static void free_here(HereShortcut *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear_here(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* HereShortcut(function, state) */
static PyObject *new_here(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs)) {
    PyObject *function, *state;
    if (!PyArg_ParseTuple(args, "OO:HereShortcut", &function, &state)) return NULL;
    HereShortcut *self = (HereShortcut *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    self->call = (vectorcallfunc)(void (*)(void))call_here;
    self->state = Py_NewRef(state);
    type->tp_flags |= Py_TPFLAGS_HAVE_VECTORCALL;
    return (PyObject *)self;
}

static PyMemberDef here_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(HereShortcut, call), READONLY, NULL},
    {NULL},
};

static PyType_Slot here_slots[] = {
    {Py_tp_doc, "`here`, done in C."},
    {Py_tp_new, new_here},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_members, here_members},
    {Py_tp_traverse, traverse_here},
    {Py_tp_clear, clear_here},
    {Py_tp_dealloc, free_here},
    {0, NULL},
};

static PyType_Spec here_spec = {
    .name = "gpuscope._native.HereShortcut",
    .basicsize = sizeof(HereShortcut),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .slots = here_slots,
};

/* are_tokens(tuple): whether each item is a token. */
static PyObject *are_tokens(PyObject *Py_UNUSED(module), PyObject *items) {
    if (!PyTuple_CheckExact(items)) return PyErr_Format(PyExc_TypeError, "expected a tuple, got %R", Py_TYPE(items));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items); i++)
        if (Py_TYPE(PyTuple_GET_ITEM(items, i)) != token_type) Py_RETURN_FALSE;
    Py_RETURN_TRUE;
}

/* prepare_tokens(type, off, nowhere, failed) */
static PyObject *prepare_tokens(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *type, *off, *nowhere, *judge;
    if (!PyArg_ParseTuple(args, "O!OOO:prepare_tokens", &PyType_Type, &type, &off, &nowhere, &judge)) return NULL;
    if (!PyType_IsSubtype((PyTypeObject *)type, fields_type))
        return PyErr_Format(PyExc_TypeError, "expected a subclass of TokenFields, got %R", type);
    put((PyObject **)&token_type, Py_NewRef(type));
    put(&is_off, Py_NewRef(off));
    put(&is_nowhere, Py_NewRef(nowhere));
    put(&failed, Py_NewRef(judge));
    Py_RETURN_NONE;
}

/* know_spans(key, lazy, none): where a context has its span, the class of ours there, and what stands for no span. */
static PyObject *know_spans(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *key, *lazy, *none;
    if (!PyArg_ParseTuple(args, "OOO:know_spans", &key, &lazy, &none)) return NULL;
    put(&lazy_type, Py_NewRef(lazy));
    put(&no_span, Py_NewRef(none));
    put(&span_key, Py_NewRef(key));
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"new_token", new_token, METH_VARARGS, "Return a token of what is known."},
    {"are_tokens", are_tokens, METH_O, "Whether each item of a tuple is a token."},
    {"prepare_tokens", prepare_tokens, METH_VARARGS, "Take the class of tokens, and the two of nothing."},
    {"know_spans", know_spans, METH_VARARGS, "Take what is to be known of OpenTelemetry's contexts."},
    {NULL},
};

int add_token(PyObject *module) {
    static const struct {
        PyObject **string;
        const char *text;
    } strings[] = {
        {&str_here, "here"},
        {&str_attached, "_attached"},
        {&str_recorder, "recorder"},
        {&str_get_span_context, "get_span_context"},
        {&str_is_valid, "is_valid"},
    };
    for (size_t i = 0; i < sizeof strings / sizeof *strings; i++)
        if ((*strings[i].string = PyUnicode_InternFromString(strings[i].text)) == NULL) return -1;
    if (add_type(module, &spec, &fields_type) || add_type(module, &here_spec, &here_type)) return -1;
    return PyModule_AddFunctions(module, functions);
}
