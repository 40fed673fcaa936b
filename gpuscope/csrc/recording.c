/*
 * `begin` and `end`, the two halves of recording a stage. The twins are in `_recording/hot_path.py`.
 *
 * After an exception Python functions do what is left to do. They swallow that of a part, and raise again what is the
 * program's: a KeyboardInterrupt, or what its own signal handler has raised.
 */
#include "sharing.h"
#include "current.h"
#include "flight.h"

#include <time.h>

/* What `prepare` gave. */
static PyObject *perf_counter;
static int keeps_threads;
static PyObject *thread_info, *begin_failed, *end_the_rest, *exception_info, *leave_behind;

static PyObject *str_append, *str_begin, *str_end, *str_enter, *str_info, *str_give_back, *str_leave, *str_leave_elsewhere,
    *str_put;

/* A required member, as a borrowed reference; null and an exception where it is not set. Whoever calls into Python with
   one holds a reference during the call, because another thread may replace the member. */
static PyObject *member(PyObject *value, const char *name) {
    if (value == NULL) PyErr_SetString(PyExc_AttributeError, name);
    return value;
}

static int read_clock(Recorder *recorder, long long *now_ns) {
#ifdef __linux__
    /* What `time.perf_counter_ns` reads on Linux, for a third of the price. */
    if (recorder->clock == perf_counter) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        *now_ns = now.tv_sec * 1000000000LL + now.tv_nsec;
        return 0;
    }
#endif
    PyObject *clock = Py_XNewRef(member(recorder->clock, "clock"));
    PyObject *reading = clock == NULL ? NULL : PyObject_CallNoArgs(clock);
    Py_XDECREF(clock);
    if (reading == NULL) return -1;
    *now_ns = PyLong_AsLongLong(reading);
    Py_DECREF(reading);
    return *now_ns == -1 && PyErr_Occurred() ? -1 : 0;
}

/* Calls `part.method(record)` or `part.method(record, more)`, and drops the result. */
static int tell(PyObject *part, PyObject *method, StageRecord *record, PyObject *more) {
    if (Py_XNewRef(member(part, "part")) == NULL) return -1;
    PyObject *function = PyObject_GetAttr(part, method), *args[] = {(PyObject *)record, more};
    PyObject *result = function == NULL ? NULL : PyObject_Vectorcall(function, args, more == NULL ? 1 : 2, NULL);
    Py_XDECREF(function);
    Py_XDECREF(result);
    Py_DECREF(part);
    return result == NULL ? -1 : 0;
}

/* Finds the enclosing stage of the same recorder, and with it the trace, or starts a trace. `outer` was current. */
static int find_place(Recorder *recorder, StageRecord *record, PyObject *outer) {
    if (PyObject_TypeCheck(outer, record_type) && ((StageRecord *)outer)->recorder == (PyObject *)recorder) {
        put(&record->outer, Py_NewRef(outer));
        put(&record->trace, Py_XNewRef(((StageRecord *)outer)->trace));
        return 0;
    }
    if (PyObject_TypeCheck(outer, record_type)) put(&record->before, Py_NewRef(outer));
    return new_trace(recorder, record);
}

/* Kept where Python keeps what belongs to a thread, and so for no longer than that. */
static int find_thread(StageRecord *record) {
    PyObject *kept = keeps_threads ? PyThreadState_GetDict() : NULL;
    PyObject *info = kept == NULL ? NULL : PyDict_GetItemWithError(kept, str_info);
    if (info != NULL) {
        put(&record->thread, Py_NewRef(info));
        return 0;
    }
    info = PyErr_Occurred() ? NULL : PyObject_CallNoArgs(thread_info);
    if (info == NULL || (kept != NULL && PyDict_SetItem(kept, str_info, info))) {
        Py_XDECREF(info);
        return -1;
    }
    put(&record->thread, info);
    return 0;
}

/* 1: there is a provider, which may be asked for the stage's ids; 0: none; -1: an exception. */
static int has_provider(PyObject *look) {
    PyObject *provider = PyObject_CallNoArgs(look);
    int answer = provider == NULL ? -1 : provider != Py_None;
    Py_XDECREF(provider);
    return answer;
}

/* 1: the application's context holds something, perhaps a span; 0: nothing; -1: an exception. */
static int has_context(Recorder *recorder) {
    PyObject *get = Py_XNewRef(member(recorder->current_context, "current_context"));
    PyObject *context = get == NULL ? NULL : PyObject_CallNoArgs(get);
    int answer = context == NULL ? -1 : PyObject_IsTrue(context);
    Py_XDECREF(get);
    Py_XDECREF(context);
    return answer;
}

static int has_ended(PyObject *outer) {
    return PyObject_TypeCheck(outer, record_type) && ((StageRecord *)outer)->end_ns != 0;
}

/* 1: the stage has business with OpenTelemetry; 0: none; -1: an exception. */
static int concerns_otel(Recorder *recorder, PyObject *outer) {
    PyObject *look = Py_XNewRef(recorder->look_for_provider);
    if (!is_present(look)) {
        Py_XDECREF(look);
        return 0;
    }
    int answer = has_provider(look);
    if (answer == 0) answer = outer == Py_None ? has_context(recorder) : has_ended(outer);
    Py_DECREF(look);
    return answer;
}

static int open_range(Recorder *recorder, StageRecord *record, PyObject *suspends) {
    PyObject *nvtx = recorder->nvtx;
    if (!is_present(nvtx)) return 0;
    Py_INCREF(nvtx);
    PyObject *range = PyObject_CallMethodObjArgs(nvtx, str_begin, record->site, suspends, NULL);
    Py_DECREF(nvtx);
    if (range == NULL) return -1;
    put(&record->range, range);
    return 0;
}

static int try_begin(Recorder *recorder, StageRecord *record, PyObject *stream, PyObject *suspends, PyObject *outer) {
    if (find_place(recorder, record, outer) || next_span_id(recorder, record) || find_thread(record)) return -1;
    if (step_in(record)) return -1;
    int concerned = concerns_otel(recorder, outer);
    if (concerned < 0 || (concerned && tell(recorder->bridge, str_enter, record, NULL))) return -1;
    if (open_range(recorder, record, suspends) || read_clock(recorder, &record->start_ns)) return -1;
    if (note_begin(recorder, record)) return -1;
    return tell(recorder->device, str_begin, record, stream);
}

/* Has Python do what is left after a failure, and judge whether the exception is the program's: -1 with that, or 0. */
static int recover(PyObject *function, Recorder *recorder, StageRecord *record, PyObject *more) {
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (traceback != NULL) PyException_SetTraceback(error, traceback);
    PyObject *result = PyObject_CallFunctionObjArgs(function, recorder, record, error, more, NULL);
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* Leaves out stages that have ended elsewhere and are still current here. */
static int find_outer(Recorder *recorder, PyObject **outer) {
    if (find_current(outer)) return -1;
    while (is_left_behind(*outer)) {
        PyObject *done = PyObject_CallFunctionObjArgs(leave_behind, recorder, *outer, NULL);
        if (done == NULL) {
            Py_CLEAR(*outer);
            return -1;
        }
        Py_DECREF(done);
        Py_SETREF(*outer, stage_before(*outer));
    }
    return 0;
}

int begin_stage(Recorder *recorder, StageRecord *record, PyObject *site, PyObject *stream, PyObject *suspends) {
    if (thread_info == NULL || site == NULL) {
        PyErr_SetString(PyExc_AttributeError, thread_info == NULL ? "`prepare` comes first" : "the record has no site");
        return -1;
    }
    note_call(record);
    put(&record->recorder, Py_NewRef((PyObject *)recorder));
    put(&record->site, Py_NewRef(site));
    record->flight = 0;
    PyObject *outer = NULL;
    Py_INCREF(recorder);
    int failed = find_outer(recorder, &outer) ||
                 try_begin(recorder, record, stream ? stream : Py_None, suspends, outer);
    Py_XDECREF(outer);
    /* It refers to nothing that refers to it, so the garbage collector need not look at it while it waits. Not so where
       it has a context or a stream of the application's, which may lead back to it. */
    if (!is_present(record->span) && !is_present(record->context_before) && !is_present(stream))
        PyObject_GC_UnTrack(record);
    if (failed) {
        failed = recover(begin_failed, recorder, record, NULL);
        if (!failed && record->flight == 0 && note_begin(recorder, record)) PyErr_Clear();
    }
    Py_DECREF(recorder);
    note_return(record, record->timed_stream);
    return failed;
}

int stage_here(Recorder *recorder, PyObject **stage) {
    if (find_current(stage)) return -1;
    while (is_left_behind(*stage)) Py_SETREF(*stage, stage_before(*stage));
    if (!PyObject_TypeCheck(*stage, record_type) || ((StageRecord *)*stage)->recorder != (PyObject *)recorder)
        Py_SETREF(*stage, Py_NewRef(Py_None));
    return 0;
}

int read_now(Recorder *recorder, long long *now_ns) { return read_clock(recorder, now_ns); }

static int leave_range(Recorder *recorder, StageRecord *record) {
    if (!is_present(record->range)) return 0;
    PyObject *opened = record->range, *nvtx = Py_XNewRef(member(recorder->nvtx, "nvtx"));
    record->range = NULL;
    PyObject *result = nvtx == NULL ? NULL : PyObject_CallMethodOneArg(nvtx, str_end, opened);
    Py_XDECREF(nvtx);
    /* A door that gives lists knows whether a range is closed, so that `close_range` may try again. */
    if (result == NULL && PyList_CheckExact(opened)) record->range = Py_NewRef(opened);
    Py_DECREF(opened);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* Makes current again what was, here and in OpenTelemetry's context. */
static int leave_contexts(Recorder *recorder, StageRecord *record) {
    int done = step_out(record);
    if (done < 0 || !is_present(record->span)) return done < 0 ? -1 : 0;
    return tell(recorder->bridge, done == TAKEN_OUT ? str_leave : str_leave_elsewhere, record, NULL);
}

/* 1: the queue took it; 0: it is full, or not open yet; -1: an exception. */
static int append(Recorder *recorder, StageRecord *record) {
    PyObject *capacity = member(recorder->capacity, "capacity");
    Py_ssize_t limit = capacity == NULL ? -1 : PyLong_AsSsize_t(capacity);
    PyObject *waiting = limit < 0 ? NULL : Py_XNewRef(member(recorder->waiting, "waiting"));
    if (waiting == NULL) return -1;
    Py_ssize_t size = PyObject_Size(waiting);
    int answer = size < 0 ? -1 : 0;
    if (!answer && size < limit) {
        PyObject *done = PyObject_CallMethodOneArg(waiting, str_append, (PyObject *)record);
        answer = done == NULL ? -1 : 1;
        Py_XDECREF(done);
    }
    Py_DECREF(waiting);
    return answer;
}

/* The queue counts the record as soon as it is called, whatever it raises. */
static int hand_over(Recorder *recorder, StageRecord *record, int *queued) {
    int taken = append(recorder, record);
    *queued = taken >= 0;
    if (taken == 0) {
        PyObject *queue = Py_XNewRef(member(recorder->queue, "queue"));
        PyObject *answer = queue == NULL ? NULL : PyObject_CallMethodOneArg(queue, str_put, (PyObject *)record);
        taken = answer == NULL ? -1 : PyObject_IsTrue(answer);
        Py_XDECREF(queue);
        Py_XDECREF(answer);
    }
    return taken ? (taken < 0 ? -1 : 0) : tell(recorder->device, str_give_back, record, NULL);
}

static int try_end(Recorder *recorder, StageRecord *record, PyObject *error, int *queued) {
    if (is_present(record->pair) && tell(recorder->device, str_end, record, NULL)) return -1;
    if (read_clock(recorder, &record->end_ns)) return -1;
    if (note_end(recorder, record, error)) return -1;
    if (leave_contexts(recorder, record) || leave_range(recorder, record)) return -1;
    if (is_present(error)) {
        PyObject *info = PyObject_CallFunctionObjArgs(exception_info, error, record, NULL);
        if (info == NULL) return -1;
        put(&record->error, info);
    }
    return hand_over(recorder, record, queued);
}

Recorder *as_recorder(PyObject *object) {
    if (object != NULL && PyObject_TypeCheck(object, recorder_type)) return (Recorder *)object;
    PyErr_SetString(PyExc_TypeError, "the recorder is not a RecorderFields");
    return NULL;
}

int end_stage(StageRecord *record, PyObject *error) {
    Recorder *recorder = as_recorder(record->recorder);
    if (recorder == NULL) return -1;
    if (record->end_ns != 0) return 0; /* Its beginning was interrupted, and undone. */
    note_call(record);
    PyObject *stream = Py_XNewRef(record->timed_stream);
    /* As in `begin_stage`; attributes are plain. */
    if ((is_present(record->span) || is_present(record->context_before)) && !PyObject_GC_IsTracked((PyObject *)record))
        PyObject_GC_Track(record);
    Py_INCREF(recorder);
    int queued = 0, failed = try_end(recorder, record, error, &queued);
    if (failed) {
        failed = recover(end_the_rest, recorder, record, queued ? Py_True : Py_False);
        FlightRing *ring = is_present(recorder->flight) ? as_ring(recorder->flight) : NULL;
        if (ring != NULL && record->flight) flight_write_end(ring, record, error);
    }
    Py_DECREF(recorder);
    note_return(record, stream);
    Py_XDECREF(stream);
    return failed;
}

static StageRecord *as_record(PyObject *object) {
    if (PyObject_TypeCheck(object, record_type)) return (StageRecord *)object;
    PyErr_Format(PyExc_TypeError, "expected a StageRecord, got %R", object);
    return NULL;
}

/* start(recorder, site, stream, suspends): a new record, begun. */
static PyObject *start(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count) {
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "start takes a recorder, a site, a stream and suspends");
        return NULL;
    }
    Recorder *recorder = as_recorder(args[0]);
    StageRecord *record = recorder == NULL ? NULL : (StageRecord *)record_type->tp_alloc(record_type, 0);
    if (record != NULL && begin_stage(recorder, record, args[1], args[2], args[3])) Py_CLEAR(record);
    return (PyObject *)record;
}

static PyObject *new_record(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored)) {
    return record_type->tp_alloc(record_type, 0);
}

static PyObject *begin(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count) {
    if (count != 5) {
        PyErr_SetString(PyExc_TypeError, "begin takes a recorder, a record, a site, a stream and suspends");
        return NULL;
    }
    Recorder *recorder = as_recorder(args[0]);
    StageRecord *record = recorder == NULL ? NULL : as_record(args[1]);
    if (record == NULL || begin_stage(recorder, record, args[2], args[3], args[4])) return NULL;
    Py_RETURN_NONE;
}

static PyObject *end(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count) {
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "end takes a record and an error or None");
        return NULL;
    }
    StageRecord *record = as_record(args[0]);
    if (record == NULL || end_stage(record, args[1])) return NULL;
    Py_RETURN_NONE;
}

/* end_raised(record, error, harmless): as `end`, but does nothing with a record that has not begun. In C, because Python
   looks for signals at the start of a function. */
static PyObject *end_raised(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count) {
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "end_raised takes a record, an error and the type of one that is harmless");
        return NULL;
    }
    StageRecord *record = as_record(args[0]);
    if (record == NULL) return NULL;
    PyObject *error = (PyObject *)Py_TYPE(args[1]) == args[2] ? Py_None : args[1];
    if (record->recorder != NULL && end_stage(record, error)) return NULL;
    Py_RETURN_NONE;
}

static PyObject *prepare(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs) {
    static char *names[] = {"keeps_threads", "current", "perf_counter", "thread_info", "begin_failed", "end_the_rest",
                            "exception_info", "leave_behind", "close_inside", NULL};
    PyObject **kept[] = {&perf_counter, &thread_info, &begin_failed, &end_the_rest, &exception_info, &leave_behind};
    PyObject *current, *close_inside, *given[6];
    int keeps;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "$pOOOOOOOO:prepare", names, &keeps, &current, &given[0], &given[1], &given[2], &given[3],
            &given[4], &given[5], &close_inside
        ))
        return NULL;
    if (keep_current(current, close_inside)) return NULL;
    for (int i = 0; i < 6; i++) put(kept[i], Py_NewRef(given[i]));
    keeps_threads = keeps;
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"prepare", (PyCFunction)(void (*)(void))prepare, METH_VARARGS | METH_KEYWORDS, "Take what is rare from Python."},
    {"start", (PyCFunction)(void (*)(void))start, METH_FASTCALL, "Return a new record, begun."},
    {"new_record", new_record, METH_NOARGS, "Return a record that may begin."},
    {"begin", (PyCFunction)(void (*)(void))begin, METH_FASTCALL, "Start a run of a stage."},
    {"end_raised", (PyCFunction)(void (*)(void))end_raised, METH_FASTCALL, "Finish a run that an exception has left."},
    {"step_out", py_step_out, METH_O, "Make current what was current before the stage."},
    {"is_collecting", py_is_collecting, METH_NOARGS, "Whether this thread collects garbage, where that matters."},
    {"note_collection", (PyCFunction)(void (*)(void))note_collection, METH_FASTCALL, "Note a garbage collection."},
    {"collections_since", collections_since, METH_O, "Return how many long garbage collections there were, and new ones."},
    {"end", (PyCFunction)(void (*)(void))end, METH_FASTCALL, "Finish a run."},
    {NULL},
};

int add_recording(PyObject *module) {
    static const struct {
        PyObject **string;
        const char *text;
    } strings[] = {
        {&str_append, "append"},
        {&str_begin, "begin"},
        {&str_end, "end"},
        {&str_enter, "enter"},
        {&str_info, "gpuscope.thread"},
        {&str_give_back, "give_back"},
        {&str_leave, "leave"},
        {&str_leave_elsewhere, "leave_elsewhere"},
        {&str_put, "put"},
    };
    for (size_t i = 0; i < sizeof strings / sizeof *strings; i++) {
        *strings[i].string = PyUnicode_InternFromString(strings[i].text);
        if (*strings[i].string == NULL) return -1;
    }
    return PyModule_AddFunctions(module, functions);
}
