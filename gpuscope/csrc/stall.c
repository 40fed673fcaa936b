/*
 * `StallWatch`: finds stages in which nothing begins or ends any more, on a thread that needs no GIL, and writes that to a
 * file where no thread of Python comes to say it. The twin in Python is `WatchInPython` of `_stalls/watch.py`, which needs the GIL.
 */
#include "stall.h"

WatchOfSlot *stall_streams;
size_t stall_slots;

#ifdef __linux__
#include "sampler.h"

#include <limits.h>
#include <stdlib.h>

static const long long DEALLOC_LIMIT_NS = 10000000;
enum { MOST_FRAMES = 64 };
static PyObject *stack; /* Of the main thread, when it last had kept the GIL; under the GIL. */
static atomic_int is_noting;

/* `StallWatch(limit_ns, warmup, kept_ns, path)`: 0 is without a limit. */
typedef struct {
    PyObject_HEAD
    StallWatch *watch;
} StallWatchObject;

/* Has a watch read this ring from now on, or none; under the lock and the GIL. */
void follow_ring(StallWatch *self, FlightRing *ring) {
    if (self->ring != NULL) self->ring->stall = NULL;
    if (ring != NULL && ring->stall != NULL) ring->stall->ring = NULL;
    self->ring = ring;
    self->read = 0;
    self->count = self->found_count = 0;
    memset(self->begun, 0, sizeof self->begun);
    memset(self->limits, 0, sizeof self->limits);
    memset(self->warmups, 0xFF, sizeof self->warmups);
    free(stall_streams);
    stall_slots = 0;
    stall_streams = ring == NULL ? NULL : calloc(ring->count, sizeof *stall_streams);
    if (ring == NULL) return;
    ring->stall = self;
    stall_slots = stall_streams == NULL ? 0 : ring->count;
}

void leave_ring(FlightRing *ring) {
    if (ring->stall == NULL) return;
    pthread_mutex_lock(&stall_lock);
    if (ring->stall != NULL) follow_ring(ring->stall, NULL);
    pthread_mutex_unlock(&stall_lock);
}

/* follow(ring): whether it is one. */
static PyObject *follow(StallWatchObject *self, PyObject *ring) {
    FlightRing *found = as_ring(ring);
    if (found == NULL) Py_RETURN_FALSE;
    pthread_mutex_lock(&stall_lock);
    if (self->watch->ring != found) follow_ring(self->watch, found);
    pthread_mutex_unlock(&stall_lock);
    Py_RETURN_TRUE;
}

static PyObject *start(StallWatchObject *self, PyObject *Py_UNUSED(nothing)) {
    return PyBool_FromLong(start_stall_watch(self->watch) == 0);
}

/* stop(limit_ns): whether the thread has ended. */
static PyObject *stop(StallWatchObject *self, PyObject *limit) {
    int failed;
    long long limit_ns = PyLong_AsLongLong(limit);
    if (limit_ns == -1 && PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = stop_stall_watch(self->watch, limit_ns);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(!failed);
}

static PyObject *take_found(StallWatch *watch) {
    pthread_mutex_lock(&stall_lock);
    PyObject *taken = PyBytes_FromStringAndSize((char *)watch->found, (Py_ssize_t)(watch->found_count * (int)sizeof(Found)));
    if (taken != NULL) watch->found_count = 0;
    pthread_mutex_unlock(&stall_lock);
    return taken;
}

/* wait(limit_ns, is_excused): what was found since the last time, as bytes, within the time. */
static PyObject *wait_found(StallWatchObject *self, PyObject *args) {
    long long limit_ns;
    int is_excused;
    if (!PyArg_ParseTuple(args, "Lp:wait", &limit_ns, &is_excused)) return NULL;
    pthread_mutex_lock(&stall_lock);
    self->watch->is_excused = is_excused;
    pthread_mutex_unlock(&stall_lock);
    Py_BEGIN_ALLOW_THREADS
    wait_for_found(self->watch, stall_now_ns() + limit_ns);
    Py_END_ALLOW_THREADS
    return take_found(self->watch); /* With the GIL: until then nobody has heard of it. */
}

/* scan(now_ns): what is found now, as bytes; for tests. */
static PyObject *scan(StallWatchObject *self, PyObject *now) {
    long long now_ns = PyLong_AsLongLong(now);
    if (now_ns == -1 && PyErr_Occurred()) return NULL;
    pthread_mutex_lock(&stall_lock);
    if (self->watch->is_excused) excuse_all(self->watch, now_ns);
    if (self->watch->ring != NULL) scan_ring(self->watch, now_ns);
    pthread_mutex_unlock(&stall_lock);
    return take_found(self->watch);
}

/* excuse(now_ns): all that runs counts as having made progress now. */
static PyObject *excuse(StallWatchObject *self, PyObject *now) {
    long long now_ns = PyLong_AsLongLong(now);
    if (now_ns == -1 && PyErr_Occurred()) return NULL;
    pthread_mutex_lock(&stall_lock);
    excuse_all(self->watch, now_ns);
    pthread_mutex_unlock(&stall_lock);
    Py_RETURN_NONE;
}

/* limit(site, limit_ns, warmup): of one stage's name, by its number in the ring. */
static PyObject *limit(StallWatchObject *self, PyObject *args) {
    long long site, limit_ns, warmup;
    if (!PyArg_ParseTuple(args, "LLL:limit", &site, &limit_ns, &warmup)) return NULL;
    if (site < 0 || site >= MAX_SITES) return PyErr_Format(PyExc_ValueError, "no such stage");
    pthread_mutex_lock(&stall_lock);
    self->watch->limits[site] = limit_ns;
    self->watch->warmups[site] = warmup < 0 ? -1 : warmup > INT_MAX ? INT_MAX : (int)warmup;
    if (limit_ns > 0 && limit_ns < self->watch->least_ns) self->watch->least_ns = limit_ns;
    pthread_mutex_unlock(&stall_lock);
    Py_RETURN_NONE;
}

static PyObject *counts(StallWatchObject *self, PyObject *Py_UNUSED(nothing)) {
    pthread_mutex_lock(&stall_lock);
    const StallWatch *watch = self->watch;
    long long stalls = watch->stalls, unwritten = watch->unwritten, read = (long long)watch->read, open = watch->count;
    pthread_mutex_unlock(&stall_lock);
    return Py_BuildValue("{sLsLsLsL}", "stalls", stalls, "unwritten", unwritten, "read", read, "open", open);
}

static PyObject *create(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs)) {
    long long limit_ns, warmup, kept_ns;
    PyObject *path;
    if (!PyArg_ParseTuple(args, "LLLO&:StallWatch", &limit_ns, &warmup, &kept_ns, PyUnicode_FSConverter, &path)) return NULL;
    StallWatchObject *self = limit_ns < 0 || warmup < 0 || kept_ns < 0 ? NULL : (StallWatchObject *)type->tp_alloc(type, 0);
    if (self != NULL) self->watch = new_stall_watch(limit_ns, (unsigned)warmup, kept_ns, PyBytes_AS_STRING(path));
    Py_DECREF(path);
    if (self != NULL && self->watch != NULL) return (PyObject *)self;
    Py_XDECREF(self);
    return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "expected nanoseconds and counts from 0 on");
}

/* Keeps the GIL, for which the thread has no use. */
static void dealloc(StallWatchObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (self->watch != NULL) {
        pthread_mutex_lock(&stall_lock);
        if (self->watch->ring != NULL) follow_ring(self->watch, NULL);
        pthread_mutex_unlock(&stall_lock);
        stop_stall_watch(self->watch, DEALLOC_LIMIT_NS);
        drop_stall_watch(self->watch);
    }
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"follow", (PyCFunction)follow, METH_O, "Read a ring from now on; return whether it is one."},
    {"start", (PyCFunction)start, METH_NOARGS, "Start the thread, unless it runs; return whether it does."},
    {"stop", (PyCFunction)stop, METH_O, "Have the thread end; return whether it has in so many nanoseconds."},
    {"wait", (PyCFunction)wait_found, METH_VARARGS, "Return what is found within so many nanoseconds, as bytes."},
    {"scan", (PyCFunction)scan, METH_O, "Return what is found at a moment, as bytes."},
    {"excuse", (PyCFunction)excuse, METH_O, "Count all that runs as having made progress at a moment."},
    {"limit", (PyCFunction)limit, METH_VARARGS, "Set the limit and the warm-up calls of a stage's name."},
    {"counts", (PyCFunction)counts, METH_NOARGS, "Return counts since the beginning."},
    {NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Finds stages that make no progress, on a thread without the GIL."},
    {Py_tp_new, create},
    {Py_tp_methods, methods},
    {Py_tp_dealloc, dealloc},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "gpuscope._native.StallWatch",
    .basicsize = sizeof(StallWatchObject),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

/* stream_states(): what each stream answered last, as bytes. */
static PyObject *stream_states(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(nothing)) {
    StreamState states[MOST_STATES];
    int count = copy_streams(states, MOST_STATES);
    return PyBytes_FromStringAndSize((char *)states, (Py_ssize_t)(count * (int)sizeof *states));
}

/* File, line and function of each frame, the innermost first; or null and an exception. */
static PyObject *frames_here(void) {
    PyObject *frames = PyList_New(0);
    PyFrameObject *frame = (PyFrameObject *)Py_XNewRef(PyEval_GetFrame());
    for (int i = 0; frames != NULL && frame != NULL && i < MOST_FRAMES; i++) {
        PyCodeObject *code = PyFrame_GetCode(frame);
        PyObject *name = PyObject_GetAttrString((PyObject *)code, "co_name");
        PyObject *file = PyObject_GetAttrString((PyObject *)code, "co_filename");
        PyObject *line = name == NULL || file == NULL ? NULL : Py_BuildValue("(OiO)", file, PyFrame_GetLineNumber(frame), name);
        if (line == NULL || PyList_Append(frames, line)) Py_CLEAR(frames);
        Py_XDECREF(line);
        Py_XDECREF(file);
        Py_XDECREF(name);
        Py_DECREF(code);
        PyFrameObject *back = PyFrame_GetBack(frame);
        Py_DECREF(frame);
        frame = back;
    }
    Py_XDECREF(frame);
    return frames;
}

/* On the main thread, between two bytecodes. */
static int note_stack(void *Py_UNUSED(ignored)) {
    PyObject *frames = frames_here();
    if (frames == NULL) PyErr_Clear();
    put(&stack, frames);
    atomic_store(&is_noting, 0);
    return 0;
}

void note_stack_soon(void) {
    if (!Py_IsInitialized() || atomic_exchange(&is_noting, 1)) return;
    if (Py_AddPendingCall(note_stack, NULL)) atomic_store(&is_noting, 0);
}

/* main_stack(): what was noted, once: the frames of the main thread, or None. */
static PyObject *main_stack(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(nothing)) {
    PyObject *noted = stack;
    stack = NULL;
    return noted == NULL ? Py_NewRef(Py_None) : noted;
}

static PyMethodDef functions[] = {
    {"main_stack", main_stack, METH_NOARGS, "Return the main thread's stack as it last let go of the GIL late, once."},
    {"stream_states", stream_states, METH_NOARGS, "Return what each stream answered last, as bytes."},
    {NULL},
};

int add_stall(PyObject *module) {
    return add_type(module, &spec, NULL) ? -1 : PyModule_AddFunctions(module, functions);
}
#else
void leave_ring(FlightRing *ring) { ring->stall = NULL; }
int add_stall(PyObject *module) { return module == NULL; }
#endif
