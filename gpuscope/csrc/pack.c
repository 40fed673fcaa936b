/*
 * Rows into the cells of a batch's columns. The twin is `BatchBuilder._pack_in_python` of
 * `_collecting/batch_builder.py`. Also what the members of batches are: `_collecting/batches/cells.py`.
 */
#include "native.h"

#include <stddef.h>
#include <stdint.h>

static PyObject *str_attached, *str_context, *str_notes, *str_calls, *str_index, *str_raw, *str_warms_up, *str_warmup;

/* One row of a batch. The twin is `ROW` of `_data/row.py`. */
typedef struct {
    unsigned long long trace_high, trace_low, span_id, parent_id, stream;
    long long site, root, thread, sampled;
    long long host_start_ns, host_end_ns, gpu_start_ns, gpu_end_ns, uncertainty_ns;
    long long device, flags;
} Cells;

/* When a stage's ids are its own: never (ask), once the sampling of its trace is decided, or always; and as the second,
   where every trace that begins in this process is sampled. */
enum { ASK, DECIDED, OWN, KEPT };

/* What is known of a site, so that a call asks once for many rows of a stage. */
typedef struct {
    PyObject *site;
    long long position, calls, warmup;
    /* Whether `calls` and `warmup` were read, and how many calls the site has not been told of. */
    int is_counted, untold;
    int warms_up;
} Known;

enum { UNKNOWN = -1, KNOWN_SITES = 32 };

typedef struct {
    PyObject *sites, *threads, *identify;
    int own, warmup_flag, remote_flag;
    long long warmup;
    /* By the sites' addresses. */
    Known known[KNOWN_SITES];
    PyObject *thread;
    long long thread_position;
} Packing;

static int read_id(PyObject *object, PyObject *name, unsigned long long *id) {
    PyObject *value = PyObject_GetAttr(object, name);
    if (value == NULL) return -1;
    *id = PyLong_AsUnsignedLongLong(value);
    Py_DECREF(value);
    return PyErr_Occurred() ? -1 : 0;
}

/* An attribute of a stage's `Standing` (`_otel/lazy_span.py`) that is None: 1; otherwise, or if it can't be told: 0. */
static int is_none(PyObject *standing, PyObject *name) {
    PyObject *value = PyObject_GetAttr(standing, name);
    int found = value == Py_None;
    if (value == NULL) PyErr_Clear();
    Py_XDECREF(value);
    return found;
}

/* Whether a stage's ids are its own as far as its place in OpenTelemetry's contexts goes: nobody has asked for them. */
static int has_own_ids(const StageRecord *record) {
    return !is_present(record->span) || is_none(record->span, str_context);
}

/* Lets go of the contexts of a stage that has ended, as `let_go_of_contexts` of `_otel/lazy_span.py` does. */
static int let_go_of_contexts(StageRecord *record) {
    put(&record->context_before, NULL);
    if (!is_present(record->span) || is_none(record->span, str_attached)) return 0;
    return PyObject_SetAttr(record->span, str_attached, Py_None);
}

/* 1: the ids are the stage's own, and are filled in; 0: `identify` has to say; -1: an exception. */
static int own_identity(const Packing *packing, StageRecord *record, Trace *trace, Cells *cells) {
    if (packing->own == KEPT && !is_present(trace->sampled) && !trace->parent_id) put(&trace->sampled, Py_NewRef(Py_True));
    if (packing->own == ASK || (packing->own != OWN && !is_present(trace->sampled))) return 0;
    if (packing->own == OWN ? is_present(record->span) : !has_own_ids(record)) return 0;
    cells->sampled = trace->sampled != Py_False;
    cells->parent_id = trace->parent_id;
    if (is_present(record->outer)) {
        StageRecord *outer = (StageRecord *)record->outer;
        if (!PyObject_TypeCheck(record->outer, record_type)) return 0;
        /* One of another trace is not the parent. */
        if (outer->trace != (PyObject *)trace ? packing->own == OWN || !is_present(record->span) : !has_own_ids(outer))
            return 0;
        if (outer->trace == (PyObject *)trace) cells->parent_id = outer->span_id;
    }
    cells->trace_high = trace->high;
    cells->trace_low = trace->low;
    cells->span_id = record->span_id;
    return let_go_of_contexts(record) ? -1 : 1;
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

/* Has a site told of its calls. */
static int tell_calls(Known *known) {
    if (known->untold == 0) return 0;
    known->untold = 0;
    PyObject *calls = PyLong_FromLongLong(known->calls);
    int failed = calls == NULL || PyObject_SetAttr(known->site, str_calls, calls);
    Py_XDECREF(calls);
    return failed ? -1 : 0;
}

/* What is known of a site; null and an exception on failure. Good until the next call. */
static Known *known_of(Packing *packing, PyObject *site) {
    Known *known = &packing->known[((uintptr_t)site >> 4) % KNOWN_SITES];
    if (known->site == site) return known;
    if (tell_calls(known)) return NULL;
    Py_XDECREF(known->site);
    *known = (Known){.site = Py_NewRef(site), .position = UNKNOWN, .warms_up = UNKNOWN};
    return known;
}

static long long site_position(Packing *packing, PyObject *site) {
    Known *known = known_of(packing, site);
    if (known == NULL) return -1;
    if (known->position == UNKNOWN) known->position = position(packing->sites, site);
    return known->position;
}

static int warms_up(Packing *packing, PyObject *root) {
    Known *known = known_of(packing, root);
    if (known == NULL) return -1;
    if (known->warms_up == UNKNOWN) {
        PyObject *answer = PyObject_GetAttr(root, str_warms_up);
        if (answer == NULL) return -1;
        known->warms_up = answer != Py_False;
        Py_DECREF(answer);
    }
    return known->warms_up;
}

static int read_calls(const Packing *packing, Known *known) {
    PyObject *calls = PyObject_GetAttr(known->site, str_calls);
    PyObject *warmup = calls == NULL ? NULL : PyObject_GetAttr(known->site, str_warmup);
    if (warmup != NULL) {
        known->calls = PyLong_AsLongLong(calls);
        known->warmup = is_present(warmup) ? PyLong_AsLongLong(warmup) : packing->warmup;
    }
    Py_XDECREF(calls);
    Py_XDECREF(warmup);
    known->is_counted = !PyErr_Occurred();
    return known->is_counted ? 0 : -1;
}

static int count_call(Packing *packing, PyObject *site, Cells *cells) {
    Known *known = known_of(packing, site);
    if (known == NULL || (!known->is_counted && read_calls(packing, known))) return -1;
    known->untold++;
    if (++known->calls <= known->warmup) cells->flags |= packing->warmup_flag;
    return 0;
}

static int fill_tables(Packing *packing, PyObject *site, PyObject *thread, PyObject *root, Cells *cells) {
    int in_warmup = warms_up(packing, root);
    if (in_warmup < 0) return -1;
    if (in_warmup) cells->flags |= packing->warmup_flag;
    cells->site = site_position(packing, site);
    cells->root = cells->site < 0 ? -1 : site_position(packing, root);
    if (cells->root < 0) return -1;
    if (packing->thread != thread) {
        packing->thread_position = position(packing->threads, thread);
        if (packing->thread_position >= 0) put(&packing->thread, Py_NewRef(thread));
    }
    cells->thread = packing->thread_position;
    return cells->thread < 0 ? -1 : 0;
}

/* Tells all sites of their calls, and lets go of what is known; keeps an exception. */
static int forget(Packing *packing) {
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    int failed = 0;
    for (int i = 0; i < KNOWN_SITES; i++) {
        failed |= tell_calls(&packing->known[i]);
        Py_CLEAR(packing->known[i].site);
    }
    Py_CLEAR(packing->thread);
    if (type != NULL) PyErr_Restore(type, error, traceback);
    return failed ? -1 : 0;
}

static int fill_device(StageRecord *record, Cells *cells) {
    cells->device = -1;
    if (cells->gpu_end_ns == 0) return 0;
    if (record->timed_stream != NULL && PyObject_TypeCheck(record->timed_stream, timed_stream_type)) {
        cells->device = ((TimedStream *)record->timed_stream)->index;
        cells->stream = ((TimedStream *)record->timed_stream)->raw;
        return 0;
    }
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
static Trace *whole_trace(const StageRecord *record) {
    if (record->trace && PyObject_TypeCheck(record->trace, trace_type) && record->site && record->thread)
        return (Trace *)record->trace;
    PyErr_SetString(PyExc_AttributeError, "the record was never begun");
    return NULL;
}

/* Calls into Python, and so holds what it uses. */
static int fill_shared(Packing *packing, const StageRecord *record, const Trace *trace, Cells *cells) {
    PyObject *site = Py_NewRef(record->site), *thread = Py_NewRef(record->thread);
    PyObject *root = Py_NewRef(trace->root ? trace->root : record->site);
    int failed = fill_tables(packing, site, thread, root, cells) || count_call(packing, site, cells);
    Py_DECREF(site);
    Py_DECREF(thread);
    Py_DECREF(root);
    return failed ? -1 : 0;
}

/* Counts the call last, because what fails is not to be counted. */
static int fill(Packing *packing, PyObject *row, Cells *cells) {
    StageRecord *record = read_row(row, cells);
    Trace *trace = record == NULL ? NULL : whole_trace(record);
    if (trace == NULL) return -1;
    int own = own_identity(packing, record, trace, cells);
    if (own < 0 || (own == 0 && asked_identity(packing, record, cells)) || (trace = whole_trace(record)) == NULL)
        return -1;
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

/* Also those of which `Bridge.details` has to say that there are none. */
static int has_details(const StageRecord *record) {
    if (is_present(record->attributes) || is_present(record->error) || is_present(record->members)) return 1;
    if (!is_present(record->span)) return 0;
    return !is_none(record->span, str_notes) || is_present(((Trace *)record->trace)->state);
}

static int note_details(PyObject *with_details, PyObject *row, Py_ssize_t i) {
    if (!has_details((StageRecord *)PyTuple_GET_ITEM(row, 0))) return 0;
    PyObject *index = PyLong_FromSsize_t(i);
    int failed = index == NULL || PyList_Append(with_details, index);
    Py_XDECREF(index);
    return failed ? -1 : 0;
}

static const StageRecord *record_of(PyObject *rows, Py_ssize_t i) {
    PyObject *row = i < PyList_GET_SIZE(rows) ? PyList_GET_ITEM(rows, i) : NULL;
    PyObject *record = row && PyTuple_CheckExact(row) && PyTuple_GET_SIZE(row) ? PyTuple_GET_ITEM(row, 0) : NULL;
    return record != NULL && PyObject_TypeCheck(record, record_type) ? (const StageRecord *)record : NULL;
}

/* Has what packing later rows reads fetched, step by step: the row, the record, what that refers to. */
static void fetch_ahead(PyObject *rows, Py_ssize_t i) {
    if (i + 2 * AHEAD < PyList_GET_SIZE(rows)) FETCH(PyList_GET_ITEM(rows, i + 2 * AHEAD));
    PyObject *row = i + AHEAD < PyList_GET_SIZE(rows) ? PyList_GET_ITEM(rows, i + AHEAD) : NULL;
    if (row != NULL && PyTuple_CheckExact(row) && PyTuple_GET_SIZE(row)) {
        const char *later = (const char *)PyTuple_GET_ITEM(row, 0);
        FETCH(later);
        FETCH(later + 64);
        FETCH(later + 128);
    }
    const StageRecord *near = record_of(rows, i + AHEAD / 2);
    if (near == NULL) return;
    FETCH(near->trace);
    FETCH(near->span);
}

/*
 * pack(rows, sites, threads, identify, own, warmup, warmup_flag, remote_flag)
 *
 * The rows' cells as bytes, and the indices of the rows with details: those with attributes, an error or a span.
 */
static PyObject *pack(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *rows;
    Packing packing = {0};
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
        fetch_ahead(rows, i);
        failed = fill(&packing, row, &cells) || note_details(with_details, row, i);
        if (failed) {
            forget(&packing);
            uncount(rows, i);
        }
        memcpy(PyBytes_AS_STRING(bytes) + i * (Py_ssize_t)sizeof cells, &cells, sizeof cells);
        Py_DECREF(row);
    }
    failed |= forget(&packing);
    PyObject *answer = failed || PyErr_Occurred() ? NULL : PyTuple_Pack(2, bytes, with_details);
    Py_XDECREF(bytes);
    Py_XDECREF(with_details);
    return answer;
}

/* A member of a batch. The twin is `MEMBER` of `_collecting/batches/cells.py`, which says what the flags are. */
typedef struct {
    unsigned long long trace_high, trace_low, span_id;
    long long token_ns, flags;
} Member;

enum { IS_SOMETHING = 1, IS_SAMPLED = 2, IS_REMOTE = 4, HAS_STATE = 8, IS_TO_ASK = 16 };
enum { TRACE_ID, SPAN_ID, REMOTE, TRACE_FLAGS, TRACE_STATE, CONTEXT_SIZE = 6 };

static void fill_from_record(StageRecord *record, int own, Member *member) {
    Trace *trace = record->trace && PyObject_TypeCheck(record->trace, trace_type) ? (Trace *)record->trace : NULL;
    if (trace != NULL && own == KEPT && !is_present(trace->sampled) && !trace->parent_id)
        put(&trace->sampled, Py_NewRef(Py_True));
    int is_decided = trace != NULL && own != ASK && (own == OWN || is_present(trace->sampled));
    if (!is_decided || !has_own_ids(record)) {
        member->flags = IS_SOMETHING | IS_TO_ASK;
        return;
    }
    member->trace_high = trace->high;
    member->trace_low = trace->low;
    member->span_id = record->span_id;
    member->flags = IS_SOMETHING;
    if (trace->sampled != Py_False) member->flags |= IS_SAMPLED;
    if (is_present(trace->state)) member->flags |= HAS_STATE;
}

/* A `SpanContext` of OpenTelemetry, or `Written`. */
static int fill_from_ids(PyObject *ids, Member *member) {
    if (split_trace_id(PyTuple_GET_ITEM(ids, TRACE_ID), &member->trace_high, &member->trace_low)) return -1;
    member->span_id = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(ids, SPAN_ID));
    long flags = PyLong_AsLong(PyTuple_GET_ITEM(ids, TRACE_FLAGS));
    int has_state = PyObject_IsTrue(PyTuple_GET_ITEM(ids, TRACE_STATE));
    if (PyErr_Occurred()) return -1;
    member->flags = IS_SOMETHING | (flags & 1 ? IS_SAMPLED : 0) | (has_state ? HAS_STATE : 0);
    if (PyTuple_GET_ITEM(ids, REMOTE) == Py_True) member->flags |= IS_REMOTE;
    return 0;
}

static Token *token_at(PyObject *tokens, Py_ssize_t i) {
    PyObject *token = i < PyTuple_GET_SIZE(tokens) ? PyTuple_GET_ITEM(tokens, i) : NULL;
    return token != NULL && PyObject_TypeCheck(token, fields_type) ? (Token *)token : NULL;
}

/* As `fetch_ahead`: the token, the record, its trace. */
static void fetch_members_ahead(PyObject *tokens, Py_ssize_t i) {
    if (i + 2 * AHEAD < PyTuple_GET_SIZE(tokens)) FETCH(PyTuple_GET_ITEM(tokens, i + 2 * AHEAD));
    Token *later = token_at(tokens, i + AHEAD), *near = token_at(tokens, i + AHEAD / 2);
    if (later != NULL && later->source != NULL) {
        FETCH(later->source);
        FETCH((const char *)later->source + 64);
        FETCH((const char *)later->source + 128);
    }
    if (near != NULL && near->source != NULL && PyObject_TypeCheck(near->source, record_type))
        FETCH(((StageRecord *)near->source)->trace);
}

/* members(tokens, own): what is known of them without asking anybody, as bytes. */
static PyObject *members_of(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *tokens;
    int own;
    if (!PyArg_ParseTuple(args, "O!i:members", &PyTuple_Type, &tokens, &own)) return NULL;
    Py_ssize_t count = PyTuple_GET_SIZE(tokens);
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof(Member));
    for (Py_ssize_t i = 0; bytes != NULL && i < count; i++) {
        Token *token = (Token *)PyTuple_GET_ITEM(tokens, i);
        fetch_members_ahead(tokens, i);
        if (!PyObject_TypeCheck((PyObject *)token, fields_type)) {
            PyErr_Format(PyExc_TypeError, "expected a token, got %R", Py_TYPE(token));
            Py_CLEAR(bytes);
            break;
        }
        Member member = {.token_ns = token->time_ns};
        PyObject *source = token->source;
        if (source != NULL && PyObject_TypeCheck(source, record_type)) {
            fill_from_record((StageRecord *)source, own, &member);
        } else if (source != NULL && PyTuple_Check(source) && PyTuple_GET_SIZE(source) == CONTEXT_SIZE) {
            if (fill_from_ids(source, &member)) Py_CLEAR(bytes);
        } else if (source != NULL && !PyUnicode_CheckExact(source)) {
            member.flags = IS_SOMETHING | IS_TO_ASK;
        }
        if (bytes != NULL) memcpy(PyBytes_AS_STRING(bytes) + i * (Py_ssize_t)sizeof member, &member, sizeof member);
    }
    return bytes;
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
    {"members", members_of, METH_VARARGS, "Return what tokens are of, as the bytes of cells."},
    {"pack", pack, METH_VARARGS, "Return rows as the bytes of a batch's cells, and which have details."},
    {NULL},
};

int add_pack(PyObject *module) {
    str_attached = PyUnicode_InternFromString("_attached");
    str_context = PyUnicode_InternFromString("_context");
    str_notes = PyUnicode_InternFromString("_notes");
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
