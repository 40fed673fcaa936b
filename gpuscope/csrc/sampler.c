/*
 * `StreamSampler`: asks the driver, many times a second, whether the streams that stages are timed on have work. It has
 * no twin: without the parts in C nothing is asked (`_cuda/stream_sampler.py`).
 */
#ifdef __linux__
#include "sampler.h"

#include <stdint.h>
#include <stdlib.h>

static const long long DEALLOC_LIMIT_NS = 10000000;
enum { MOST_ANSWERS = 1 << 20 };

/* `StreamSampler(set_context, exchange_mode, is_capturing, query, mean_ns, capacity)`: addresses, and the ring's size */
typedef struct {
    PyObject_HEAD
    Sampler *sampler;
} StreamSampler;

static Watch *free_watches; /* Under the lock. */

/* Under the lock. */
static void forget(Watch *watch) {
    Sampler *owner = watch->owner;
    watch->owner = NULL;
    for (int i = 0; owner != NULL && i < owner->count; i++)
        if (owner->watches[i] == watch) {
            owner->watches[i] = owner->watches[--owner->count];
            break;
        }
}

void release_watch(TimedStream *timed_stream) {
    Watch *watch = timed_stream->watch;
    if (watch == NULL) return;
    timed_stream->watch = NULL;
    pthread_mutex_lock(&sampler_lock);
    forget(watch);
    watch->next = free_watches;
    free_watches = watch;
    pthread_mutex_unlock(&sampler_lock);
}

/* Null where there is no room, or no memory. */
static Watch *new_watch(Sampler *owner, void *context, void *stream, int device) {
    pthread_mutex_lock(&sampler_lock);
    Watch *watch = NULL;
    if (owner->count == MOST_STREAMS) {
        owner->counts[UNWATCHED]++;
    } else if ((watch = free_watches) != NULL) {
        free_watches = watch->next;
    } else {
        watch = calloc(1, sizeof *watch);
    }
    if (watch != NULL) {
        watch->owner = owner;
        watch->context = context;
        watch->stream = stream;
        watch->device = device;
        atomic_store(&watch->open, 0);
        atomic_store(&watch->used_ns, 0);
        watch->had_work_ns = watch->is_refused = 0;
        watch->asked_ns = watch->work_since_ns = watch->free_since_ns = 0;
        owner->watches[owner->count++] = watch;
    }
    pthread_mutex_unlock(&sampler_lock);
    return watch;
}

static TimedStream *as_timed_stream(PyObject *object) {
    if (PyObject_TypeCheck(object, timed_stream_type)) return (TimedStream *)object;
    PyErr_Format(PyExc_TypeError, "expected a TimedStream, got %R", object);
    return NULL;
}

/* watch(timed_stream, context): whether it is asked about from now on. One that may be gone never is. */
static PyObject *watch(StreamSampler *self, PyObject *args) {
    PyObject *object;
    unsigned long long context;
    if (!PyArg_ParseTuple(args, "OK:watch", &object, &context)) return NULL;
    TimedStream *timed_stream = as_timed_stream(object);
    if (timed_stream == NULL) return NULL;
    if (timed_stream->foreign || timed_stream->guarded || timed_stream->watch != NULL) Py_RETURN_FALSE;
    timed_stream->watch = new_watch(
        self->sampler, (void *)(uintptr_t)context, (void *)(uintptr_t)timed_stream->raw, (int)timed_stream->index
    );
    return PyBool_FromLong(timed_stream->watch != NULL);
}

/* unwatch(timed_stream): whether it was asked about until now. */
static PyObject *unwatch(PyObject *Py_UNUSED(self), PyObject *object) {
    TimedStream *timed_stream = as_timed_stream(object);
    if (timed_stream == NULL) return NULL;
    if (timed_stream->watch == NULL) Py_RETURN_FALSE;
    pthread_mutex_lock(&sampler_lock);
    int was_watched = timed_stream->watch->owner != NULL;
    forget(timed_stream->watch);
    pthread_mutex_unlock(&sampler_lock);
    return PyBool_FromLong(was_watched);
}

static PyObject *start(StreamSampler *self, PyObject *Py_UNUSED(nothing)) {
    return PyBool_FromLong(start_sampler(self->sampler) == 0);
}

/* stop(limit_ns): whether the thread has ended. */
static PyObject *stop(StreamSampler *self, PyObject *limit) {
    int failed;
    long long limit_ns = PyLong_AsLongLong(limit);
    if (limit_ns == -1 && PyErr_Occurred()) return NULL;
    if (limit_ns < 0 || limit_ns > 3600 * SECOND_NS) return PyErr_Format(PyExc_ValueError, "expected 0 ns to an hour");
    Py_BEGIN_ALLOW_THREADS
    failed = stop_sampler(self->sampler, limit_ns);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(!failed);
}

/* take(): the answers since it was last called, oldest first, as bytes. */
static PyObject *take(StreamSampler *self, PyObject *Py_UNUSED(nothing)) {
    Sampler *sampler = self->sampler;
    pthread_mutex_lock(&sampler_lock);
    size_t held = sampler->held;
    pthread_mutex_unlock(&sampler_lock);
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(held * sizeof(Answer)));
    if (bytes == NULL) return NULL;
    Answer *to = (Answer *)PyBytes_AS_STRING(bytes);
    pthread_mutex_lock(&sampler_lock);
    size_t count = held < sampler->held ? held : sampler->held;
    size_t before_end = sampler->capacity - sampler->first;
    if (before_end > count) before_end = count;
    memcpy(to, sampler->ring + sampler->first, before_end * sizeof *to);
    memcpy(to + before_end, sampler->ring, (count - before_end) * sizeof *to);
    sampler->first = (sampler->first + count) % sampler->capacity;
    sampler->held -= count;
    pthread_mutex_unlock(&sampler_lock);
    if (count < held) _PyBytes_Resize(&bytes, (Py_ssize_t)(count * sizeof(Answer))); /* Another thread took them. */
    return bytes;
}

static PyObject *counts(StreamSampler *self, PyObject *Py_UNUSED(nothing)) {
    long long found[COUNTS];
    pthread_mutex_lock(&sampler_lock);
    memcpy(found, self->sampler->counts, sizeof found);
    pthread_mutex_unlock(&sampler_lock);
    return Py_BuildValue(
        "{sLsLsLsLsLsLsL}", "asked", found[ASKED], "had_work", found[HAD_WORK], "dropped", found[DROPPED], "errors",
        found[ERRORS], "captures", found[CAPTURES], "late", found[LATE], "unwatched", found[UNWATCHED]
    );
}

static PyObject *is_running(StreamSampler *self, void *Py_UNUSED(closure)) {
    pthread_mutex_lock(&sampler_lock);
    int running = self->sampler->is_running;
    pthread_mutex_unlock(&sampler_lock);
    return PyBool_FromLong(running);
}

static PyObject *create(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    unsigned long long set_context, exchange_mode, is_capturing, query;
    long long mean_ns, capacity;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs))
        return PyErr_Format(PyExc_TypeError, "StreamSampler takes no keyword arguments");
    if (!PyArg_ParseTuple(
            args, "KKKKLL:StreamSampler", &set_context, &exchange_mode, &is_capturing, &query, &mean_ns, &capacity
        ))
        return NULL;
    if (!set_context || !exchange_mode || !is_capturing || !query)
        return PyErr_Format(PyExc_ValueError, "the address of a function is null");
    if (mean_ns < 1000 || mean_ns > 3600 * SECOND_NS || capacity < 1 || capacity > MOST_ANSWERS)
        return PyErr_Format(PyExc_ValueError, "expected 1 us to an hour, and room for 1 to %d answers", MOST_ANSWERS);
    const Calls calls = {
        (int (*)(void *))(uintptr_t)set_context,
        (int (*)(int *))(uintptr_t)exchange_mode,
        (int (*)(void *, int *))(uintptr_t)is_capturing,
        (int (*)(void *))(uintptr_t)query,
    };
    StreamSampler *self = (StreamSampler *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    self->sampler = new_sampler(&calls, mean_ns, (size_t)capacity);
    if (self->sampler != NULL) return (PyObject *)self;
    Py_DECREF(self);
    return PyErr_NoMemory();
}

/* Keeps the GIL, for which the thread has no use. */
static void dealloc(StreamSampler *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (self->sampler != NULL) {
        stop_sampler(self->sampler, DEALLOC_LIMIT_NS);
        drop_sampler(self->sampler);
    }
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *hold(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(nothing)) {
    Py_BEGIN_ALLOW_THREADS
    hold_samplers();
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *release(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(nothing)) {
    release_samplers();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"watch", (PyCFunction)watch, METH_VARARGS, "Ask about a stream from now on, where it can't go away."},
    {"unwatch", (PyCFunction)unwatch, METH_O, "Ask no more about a stream."},
    {"start", (PyCFunction)start, METH_NOARGS, "Start the thread, unless it runs; return whether it does."},
    {"stop", (PyCFunction)stop, METH_O, "Have the thread end; return whether it has in so many nanoseconds."},
    {"take", (PyCFunction)take, METH_NOARGS, "Return the answers since the last call, as bytes."},
    {"counts", (PyCFunction)counts, METH_NOARGS, "Return counts since the beginning."},
    {NULL},
};

static PyGetSetDef properties[] = {
    {"is_running", (getter)is_running, NULL, "Whether the thread runs.", NULL},
    {NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Asks the driver at random moments whether streams have work, on a thread without the GIL."},
    {Py_tp_new, create},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {Py_tp_dealloc, dealloc},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "gpuscope._native.StreamSampler",
    .basicsize = sizeof(StreamSampler),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

static PyMethodDef functions[] = {
    {"hold_samplers", hold, METH_NOARGS, "Have no sampler ask anything until `release_samplers`."},
    {"release_samplers", release, METH_NOARGS, "Undo one `hold_samplers`."},
    {NULL},
};

int add_sampler(PyObject *module) {
    return add_type(module, &spec, NULL) ? -1 : PyModule_AddFunctions(module, functions);
}
#else
#include "watch.h"

void release_watch(TimedStream *timed_stream) { timed_stream->watch = NULL; }
int add_sampler(PyObject *module) { return module == NULL; }
#endif
