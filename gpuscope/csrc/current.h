/*
 * Which stage is current, in which context; for `recording.c` alone, which calls it on the hot path, so that the compiler
 * can make one function of both. What returns an int returns -1 and an exception on failure. The twin is `_recording/current_stage.py`, which says what a stage's place
 * is, and why no context is touched within a garbage collection.
 */
#include "native.h"

enum { ELSEWHERE, TAKEN_OUT };

static PyObject *current, *close_inside;

#if PY_VERSION_HEX < 0x030C0000
/* The thread that collects garbage, or 0; and what is current in the finalizers that it runs, or null. */
static unsigned long collecting_thread;
static PyObject *collecting_stage;

static inline int is_collecting(void) {
    return collecting_thread != 0 && collecting_thread == PyThread_get_thread_ident();
}
#else
#define collecting_stage unused_stage
static PyObject *unused_stage;
static inline int is_collecting(void) { return 0; }
#endif

/* The address of the current context, by which it is known as long as it exists. */
static inline unsigned long long here(void) { return (uintptr_t)PyThreadState_Get()->context; }

/* A new reference, which is never null. */
static PyObject *before(StageRecord *record) {
    PyObject *found = is_present(record->before) ? record->before : record->outer;
    return Py_NewRef(found != NULL ? found : Py_None);
}

static int find_current(PyObject **stage) {
    if (is_collecting() && collecting_stage != NULL) {
        *stage = Py_NewRef(collecting_stage);
        return 0;
    }
    return PyContextVar_Get(current, NULL, stage);
}

/* Its callers hold what is current by now, so that nothing is freed within. */
static int set_current(PyObject *stage) {
#if PY_VERSION_HEX < 0x030C0000
    /* A collection within could run a finalizer that sets a variable, and free the table that this one walks on. */
    int enabled = PyGC_Disable();
    PyObject *token = PyContextVar_Set(current, stage);
    if (enabled) PyGC_Enable();
#else
    PyObject *token = PyContextVar_Set(current, stage);
#endif
    Py_XDECREF(token);
    return token == NULL ? -1 : 0;
}

static int step_in(StageRecord *record) {
    if (is_collecting()) {
        put(&collecting_stage, Py_NewRef((PyObject *)record));
        return 0;
    }
    if (set_current((PyObject *)record)) return -1;
    record->place = here();
    return 0;
}

static int is_inside(PyObject *now, StageRecord *record) {
    while (now != NULL && now != (PyObject *)record && PyObject_TypeCheck(now, record_type)) {
        StageRecord *each = (StageRecord *)now;
        now = is_present(each->before) ? each->before : each->outer;
    }
    return now == (PyObject *)record;
}

static int step_out_of(StageRecord *record, PyObject *now) {
    int own = record->place != 0 && record->place == here(), answer = ELSEWHERE;
    if (now == (PyObject *)record || (own && is_inside(now, record))) {
        PyObject *outer = before(record);
        int failed = set_current(outer);
        Py_DECREF(outer);
        if (!failed && now != (PyObject *)record) {
            PyObject *done = PyObject_CallFunctionObjArgs(close_inside, record, now, NULL);
            failed = done == NULL ? -1 : 0;
            Py_XDECREF(done);
        }
        if (failed) return -1;
        if (own) answer = TAKEN_OUT;
    }
    if (own) {
        record->place = 0;
        put(&record->before, NULL);
    }
    return answer;
}

static int step_out(StageRecord *record) {
    if (is_collecting()) {
        if (collecting_stage == (PyObject *)record) put(&collecting_stage, before(record));
        return ELSEWHERE;
    }
    PyObject *now = NULL;
    if (PyContextVar_Get(current, NULL, &now)) return -1;
    int answer = step_out_of(record, now);
    Py_XDECREF(now);
    return answer;
}

static int is_left_behind(PyObject *stage) {
    if (!PyObject_TypeCheck(stage, record_type) || is_collecting()) return 0;
    StageRecord *record = (StageRecord *)stage;
    return record->end_ns != 0 && record->place != 0 && record->place == here();
}

static PyObject *stage_before(PyObject *stage) { return before((StageRecord *)stage); }

static int keep_current(PyObject *variable, PyObject *closing) {
    if (!PyContextVar_CheckExact(variable)) {
        PyErr_SetString(PyExc_TypeError, "current must be a ContextVar");
        return -1;
    }
    put(&current, Py_NewRef(variable));
    put(&close_inside, Py_NewRef(closing));
    return 0;
}

static PyObject *py_step_out(PyObject *Py_UNUSED(module), PyObject *record) {
    if (!PyObject_TypeCheck(record, record_type) || current == NULL)
        return PyErr_Format(PyExc_TypeError, "expected a StageRecord, got %R", record);
    int answer = step_out((StageRecord *)record);
    return answer < 0 ? NULL : PyLong_FromLong(answer);
}

static PyObject *py_is_collecting(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored)) {
    return PyBool_FromLong(is_collecting());
}

/* ---- Garbage collections; the twin is `_recording/pauses/collections.py`. All is called under the GIL. */

enum { MOST_PAUSES = 1024, LONG_NS = 1000000, FULL = 2 };

/* The newest collections of the oldest generation, or longer than 1 ms, in turns. */
static struct {
    long long start_ns, end_ns;
    long generation;
} pauses[MOST_PAUSES];
static unsigned long long pause_count;

static void note_pause(int starts, PyObject *facts) {
    static long long start_ns; /* Python runs one collection at a time. */
    long long now_ns = sharing_now_ns();
    if (starts) {
        start_ns = now_ns;
    } else if (start_ns) {
        PyObject *told = PyDict_Check(facts) ? PyDict_GetItemString(facts, "generation") : NULL;
        long generation = told != NULL && PyLong_Check(told) ? PyLong_AsLong(told) : 0;
        if (generation >= FULL || now_ns - start_ns > LONG_NS) {
            pauses[pause_count % MOST_PAUSES].start_ns = start_ns;
            pauses[pause_count % MOST_PAUSES].end_ns = now_ns;
            pauses[pause_count++ % MOST_PAUSES].generation = generation;
        }
        start_ns = 0;
    }
}

/* collections_since(count): how many there were, and those after the first `count` that are still known. */
static PyObject *collections_since(PyObject *Py_UNUSED(module), PyObject *seen) {
    unsigned long long from = PyLong_AsUnsignedLongLong(seen);
    if (PyErr_Occurred()) return NULL;
    PyObject *found = PyList_New(0);
    if (found != NULL && pause_count > MOST_PAUSES && from < pause_count - MOST_PAUSES) from = pause_count - MOST_PAUSES;
    for (; found != NULL && from < pause_count; from++) {
        size_t at = from % MOST_PAUSES;
        PyObject *one = Py_BuildValue("(LLl)", pauses[at].start_ns, pauses[at].end_ns, pauses[at].generation);
        if (one == NULL || PyList_Append(found, one)) Py_CLEAR(found);
        Py_XDECREF(one);
    }
    return found == NULL ? NULL : Py_BuildValue("(KN)", pause_count, found);
}

/* note_collection(phase, facts): `gc.callbacks` calls it. */
static PyObject *note_collection(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count) {
    if (count != 2 || !PyUnicode_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "note_collection takes a phase and facts");
        return NULL;
    }
    int starts = PyUnicode_CompareWithASCIIString(args[0], "start") == 0;
#if PY_VERSION_HEX < 0x030C0000
    put(&collecting_stage, NULL);
    collecting_thread = starts ? PyThread_get_thread_ident() : 0;
#endif
    note_pause(starts, args[1]);
    Py_RETURN_NONE;
}
