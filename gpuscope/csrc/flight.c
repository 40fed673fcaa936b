/*
 * The flight recorder's ring. The twin is `_flight/ring.py`, which says what it does; the layout is that of
 * `_data/flight.py`.
 */
#include "flight.h"

#include <limits.h>
#include <pthread.h>
#include <signal.h>

enum { SITES_AT = 49152, SITE_BYTES = 128, THREADS_AT = 16384, THREAD_BYTES = 64, RING_AT = SITES_AT + MAX_SITES * SITE_BYTES };

PyTypeObject *flight_type;
unsigned flight_forks;

static volatile sig_atomic_t was_signalled;
static PyObject *str_begin, *str_end, *str_name, *str_ident, *str_warmup, *str_warms_up;

static Number check_of(const Number *field, Number word) {
    Number total = field[0] + 3 * field[1] + 5 * field[2] + 7 * field[3] + 11 * field[4] + 17 * field[6] + 19 * word;
    if ((word & KIND_MASK) != STAGE_KIND) total += 13 * field[END];
    return total * 0x9E3779B97F4A7C15ULL >> 48;
}

/* The next slot, past those of stages that still run. */
static Slot *take_slot(FlightRing *ring, int which, Number *lap) {
    Part *part = &ring->parts[which];
    Slot *slots = ring->slots + (which == OF_COLLECTOR ? ring->count : 0);
    for (int skipped = 0;; skipped++) {
        Slot *slot = &slots[part->cursor];
        *lap = part->lap;
        if (++part->cursor == ring->count) {
            part->cursor = 0;
            part->lap++;
        }
#ifdef __GNUC__
        __builtin_prefetch(&slots[part->cursor], 1);
#endif
        Number word = atomic_load_explicit(&slot->word, memory_order_relaxed);
        int runs = (word & KIND_MASK) == STAGE_KIND && !atomic_load_explicit(&slot->field[END], memory_order_relaxed);
        if (!runs || skipped == MOST_SKIPPED) return slot;
    }
}

static Slot *write_slot(FlightRing *ring, int which, const Number *field, Number word) {
    Number lap;
    Slot *slot = take_slot(ring, which, &lap);
    word |= lap << LAP_SHIFT;
    /* Whatever ends the process: the word is not there before all else is, and that of before is gone by then. */
    atomic_store_explicit(&slot->word, 0, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
    for (int i = 0; i < 7; i++) atomic_store_explicit(&slot->field[i], field[i], memory_order_relaxed);
    atomic_store_explicit(&slot->word, word | check_of(field, word) << CHECK_SHIFT, memory_order_release);
    return slot;
}

/* ---- Names */

static size_t bucket_of(const PyObject *object, size_t buckets) {
    uintptr_t address = (uintptr_t)object;
    return (address >> 4 ^ address >> 15) & (buckets - 1);
}

/* Where an object is, or where it would be put. */
static Known *find(Known *table, size_t buckets, const PyObject *object) {
    size_t i = bucket_of(object, buckets);
    while (table[i].object != NULL && table[i].object != object) i = (i + 1) & (buckets - 1);
    return &table[i];
}

/* Text as the file has it: its length is written last. */
static void write_text(char *at, PyObject *text, size_t most) {
    Py_ssize_t size = 0;
    const char *letters = text != NULL && PyUnicode_Check(text) ? PyUnicode_AsUTF8AndSize(text, &size) : NULL;
    if (letters == NULL) {
        PyErr_Clear();
        letters = "?";
        size = 1;
    }
    if ((size_t)size > most) {
        size = (Py_ssize_t)most;
        while (size > 0 && (letters[size] & 0xC0) == 0x80) size--;
    }
    atomic_store_explicit((_Atomic unsigned *)at, 0, memory_order_release);
    memcpy(at + 4, letters, (size_t)size);
    atomic_store_explicit((_Atomic unsigned *)at, (unsigned)size, memory_order_release);
}

/* A stage's own number of first calls that are warm-up, all where what is inside is warm-up too; -1 for none. */
static int warmup_of(PyObject *site) {
    PyObject *warms_up = PyObject_GetAttr(site, str_warms_up), *own = PyObject_GetAttr(site, str_warmup);
    int all = warms_up == Py_True, overflows = 0;
    long calls = own != NULL && PyLong_Check(own) ? PyLong_AsLongAndOverflow(own, &overflows) : -1;
    Py_XDECREF(warms_up);
    Py_XDECREF(own);
    PyErr_Clear();
    return all || overflows > 0 || calls > INT_MAX ? INT_MAX : calls < 0 ? -1 : (int)calls;
}

static Number add_site(FlightRing *ring, PyObject *site, Known *place) {
    if (ring->site_count == MAX_SITES - 1) return 0;
    PyObject *name = PyObject_GetAttr(site, str_name);
    Number number = ++ring->site_count;
    write_text(ring->base + SITES_AT + number * SITE_BYTES, name, SITE_BYTES - 4);
    Py_XDECREF(name);
    ring->warmups[number] = warmup_of(site);
    *place = (Known){Py_NewRef(site), number};
    return number;
}

static Number site_number(FlightRing *ring, PyObject *site) {
    if (site == NULL) return 0;
    Known *place = find(ring->sites, SITE_BUCKETS, site);
    return place->object != NULL ? place->value : add_site(ring, site, place);
}

static void forget(Known *table, size_t buckets) {
    for (size_t i = 0; i < buckets; i++) Py_CLEAR(table[i].object);
}

static Number add_thread(FlightRing *ring, PyObject *thread) {
    if (ring->thread_count && ring->thread_count % MAX_THREADS == 0) forget(ring->threads, THREAD_BUCKETS);
    PyObject *name = PyObject_GetAttr(thread, str_name), *number = name == NULL ? NULL : PyObject_GetAttr(thread, str_ident);
    Number ident = number != NULL && PyLong_Check(number) ? PyLong_AsUnsignedLongLongMask(number) : 0;
    PyErr_Clear();
    char *at = ring->base + THREADS_AT + ring->thread_count++ % MAX_THREADS * THREAD_BYTES;
    memcpy(at, &ident, 8);
    write_text(at + 8, name, THREAD_BYTES - 12);
    Py_XDECREF(name);
    Py_XDECREF(number);
    *find(ring->threads, THREAD_BUCKETS, thread) = (Known){Py_NewRef(thread), ident};
    return ident;
}

static Number thread_ident(FlightRing *ring, PyObject *thread) {
    if (thread == NULL) return 0;
    if (thread == ring->last_thread.object) return ring->last_thread.value;
    Known *place = find(ring->threads, THREAD_BUCKETS, thread);
    Number ident = place->object != NULL ? place->value : add_thread(ring, thread);
    put(&ring->last_thread.object, Py_NewRef(thread));
    ring->last_thread.value = ident;
    return ident;
}

/* ---- Stages */

static void fields_of(FlightRing *ring, StageRecord *record, Number *field, Number *word) {
    memset(field, 0, 7 * sizeof *field);
    *word = STAGE_KIND | site_number(ring, record->site) << SITE_SHIFT;
    field[2] = record->span_id;
    field[4] = (Number)record->start_ns;
    field[6] = thread_ident(ring, record->thread);
    if (record->trace == NULL || !Py_IS_TYPE(record->trace, trace_type)) return;
    Trace *trace = (Trace *)record->trace;
    field[0] = trace->high;
    field[1] = trace->low;
    PyObject *outer = record->outer;
    if (is_present(outer) && PyObject_TypeCheck(outer, record_type)) {
        field[3] = ((StageRecord *)outer)->span_id;
    } else {
        field[3] = trace->parent_id;
        if (trace->remote) *word |= FLAG_REMOTE << FLAGS_SHIFT;
    }
}

void flight_write_begin(FlightRing *ring, StageRecord *record) {
    Number field[7], word;
    fields_of(ring, record, field, &word);
    record->flight = (Number)(write_slot(ring, OF_STAGES, field, word) - ring->slots) + 1;
    if (ring->stall != NULL && stall_streams != NULL && record->flight - 1 < stall_slots)
        atomic_store_explicit(&stall_streams[record->flight - 1], NULL, memory_order_relaxed);
}

/* A request that asks for a dump says so in the ring, and the collector looks. */
static void mark(FlightRing *ring, StageRecord *record, unsigned why, long long ns) {
    Number field[7], word;
    fields_of(ring, record, field, &word);
    field[3] = why;
    field[END] = (Number)ns;
    write_slot(ring, OF_STAGES, field, (word & ~(Number)KIND_MASK) | MARK_KIND);
    ring->wanted |= why;
}

static int is_of(const Slot *slot, const StageRecord *record) {
    return (slot->word & KIND_MASK) == STAGE_KIND && slot->field[2] == record->span_id && slot->field[END] == 0 &&
           slot->field[4] == (Number)record->start_ns;
}

void flight_write_end(FlightRing *ring, StageRecord *record, PyObject *error) {
    size_t at = (size_t)record->flight - 1;
    record->flight = 0;
    long long ns = record->end_ns > record->start_ns ? record->end_ns - record->start_ns : 0;
    int failed = is_present(error);
    Number end = (Number)ns << 2 | (Number)failed << 1 | 1;
    if (at < ring->count && is_of(&ring->slots[at], record)) {
        atomic_store_explicit(&ring->slots[at].field[END], end, memory_order_release);
    } else {
        Number field[7], word;
        fields_of(ring, record, field, &word);
        field[END] = end;
        write_slot(ring, OF_STAGES, field, word);
    }
    if (is_present(record->outer)) return;
    unsigned why = ring->slow_ns && ns >= ring->slow_ns ? WANT_SLOW : 0;
    if (failed && PyObject_TypeCheck(error, (PyTypeObject *)PyExc_Exception)) why |= WANT_FAILED;
    if (why) mark(ring, record, why, ns);
}

int flight_call(PyObject *flight, StageRecord *record) {
    Py_INCREF(flight);
    PyObject *done = PyObject_CallMethodOneArg(flight, str_begin, (PyObject *)record);
    Py_DECREF(flight);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

int flight_call_end(PyObject *flight, StageRecord *record, PyObject *error) {
    Py_INCREF(flight);
    PyObject *done = PyObject_CallMethodObjArgs(flight, str_end, record, is_present(error) ? error : Py_None, NULL);
    Py_DECREF(flight);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* ---- The type */

static PyObject *require_record(PyObject *object) {
    if (PyObject_TypeCheck(object, record_type)) return object;
    return PyErr_Format(PyExc_TypeError, "expected a StageRecord, got %R", object);
}

static PyObject *begin(FlightRing *self, PyObject *record) {
    if (require_record(record) == NULL) return NULL;
    if (as_ring((PyObject *)self) != NULL) flight_write_begin(self, (StageRecord *)record);
    Py_RETURN_NONE;
}

static PyObject *end(FlightRing *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 2) return PyErr_Format(PyExc_TypeError, "end takes a record and an error or None");
    if (require_record(args[0]) == NULL) return NULL;
    StageRecord *record = (StageRecord *)args[0];
    if (record->flight && as_ring((PyObject *)self) != NULL) flight_write_end(self, record, args[1]);
    Py_RETURN_NONE;
}

/* write(records): whole records, whose words lack lap and check. */
static PyObject *write_records(FlightRing *self, PyObject *records) {
    Py_buffer given;
    if (PyObject_GetBuffer(records, &given, PyBUF_SIMPLE)) return NULL;
    if (as_ring((PyObject *)self) != NULL)
        for (Py_ssize_t at = 0; at + (Py_ssize_t)sizeof(Slot) <= given.len; at += (Py_ssize_t)sizeof(Slot)) {
            Number field[8];
            memcpy(field, (char *)given.buf + at, sizeof field);
            write_slot(self, OF_COLLECTOR, field, field[7]);
        }
    PyBuffer_Release(&given);
    Py_RETURN_NONE;
}

static PyObject *site(FlightRing *self, PyObject *object) {
    return PyLong_FromUnsignedLongLong(as_ring((PyObject *)self) == NULL ? 0 : site_number(self, object));
}

static PyObject *thread(FlightRing *self, PyObject *object) {
    return PyLong_FromUnsignedLongLong(as_ring((PyObject *)self) == NULL ? 0 : thread_ident(self, object));
}

static PyObject *take_wanted(FlightRing *self, PyObject *Py_UNUSED(ignored)) {
    unsigned wanted = self->wanted | (was_signalled ? WANT_SIGNAL : 0);
    self->wanted = 0;
    was_signalled = 0;
    return PyLong_FromUnsignedLong(wanted);
}

static int clear(FlightRing *self) {
    if (self->sites != NULL) forget(self->sites, SITE_BUCKETS);
    if (self->threads != NULL) forget(self->threads, THREAD_BUCKETS);
    Py_CLEAR(self->last_thread.object);
    return 0;
}

static PyObject *close_ring(FlightRing *self, PyObject *Py_UNUSED(ignored)) {
    int is_open = self->base != NULL;
    leave_ring(self);
    self->base = NULL;
    clear(self);
    if (is_open) PyBuffer_Release(&self->view);
    Py_RETURN_NONE;
}

/* FlightRing(file, slow_ns): `file` is the mapped file. */
static PyObject *new_ring(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs)) {
    Py_buffer view;
    long long slow_ns;
    if (!PyArg_ParseTuple(args, "w*L:FlightRing", &view, &slow_ns)) return NULL;
    FlightRing *self = view.len < RING_AT + 2 * (Py_ssize_t)sizeof(Slot) || (uintptr_t)view.buf % sizeof(Slot)
                           ? NULL
                           : (FlightRing *)type->tp_alloc(type, 0);
    if (self == NULL) {
        PyBuffer_Release(&view);
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "no room for a ring");
    }
    self->view = view;
    self->base = view.buf;
    self->slots = (Slot *)(self->base + RING_AT);
    self->count = ((size_t)view.len - RING_AT) / sizeof(Slot) / 2;
    self->slow_ns = slow_ns;
    self->forks = flight_forks;
    memset(self->warmups, 0xFF, sizeof self->warmups);
    self->sites = PyMem_Calloc(SITE_BUCKETS, sizeof(Known));
    self->threads = PyMem_Calloc(THREAD_BUCKETS, sizeof(Known));
    if (self->sites == NULL || self->threads == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static int traverse(FlightRing *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    for (size_t i = 0; self->sites != NULL && i < SITE_BUCKETS; i++) Py_VISIT(self->sites[i].object);
    for (size_t i = 0; self->threads != NULL && i < THREAD_BUCKETS; i++) Py_VISIT(self->threads[i].object);
    Py_VISIT(self->last_thread.object);
    return 0;
}

static void dealloc(FlightRing *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Py_DECREF(close_ring(self, NULL));
    PyMem_Free(self->sites);
    PyMem_Free(self->threads);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"begin", (PyCFunction)begin, METH_O, "Note that a stage has begun."},
    {"end", (PyCFunction)(void (*)(void))end, METH_FASTCALL, "Note that a stage has ended."},
    {"write", (PyCFunction)write_records, METH_O, "Write whole records."},
    {"site", (PyCFunction)site, METH_O, "Return the number of a stage's name."},
    {"thread", (PyCFunction)thread, METH_O, "Return a thread's ident, and have its name in the file."},
    {"take_wanted", (PyCFunction)take_wanted, METH_NOARGS, "Return why a dump is wanted, as bits, and forget it."},
    {"close", (PyCFunction)close_ring, METH_NOARGS, "Let go of the file."},
    {NULL},
};

static PyType_Slot type_slots[] = {
    {Py_tp_doc, "The flight recorder's ring of records in a mapped file."},
    {Py_tp_new, new_ring},
    {Py_tp_methods, methods},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_dealloc, dealloc},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "gpuscope._native.FlightRing",
    .basicsize = sizeof(FlightRing),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = type_slots,
};

/* ---- The signal, which is seen even while Python's main thread is in C */

static void on_signal(int Py_UNUSED(number)) { was_signalled = 1; }

/* listen(signal): whether it is ours now; not where the program handles or ignores it. */
static PyObject *listen_to(PyObject *Py_UNUSED(module), PyObject *number) {
    int which = (int)PyLong_AsLong(number);
    struct sigaction before, ours = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    if (PyErr_Occurred()) return NULL;
    if (sigaction(which, NULL, &before)) return PyErr_SetFromErrno(PyExc_OSError);
    int is_free = !(before.sa_flags & SA_SIGINFO) && before.sa_handler == SIG_DFL;
    int is_ours = !(before.sa_flags & SA_SIGINFO) && before.sa_handler == on_signal;
    sigemptyset(&ours.sa_mask);
    if (is_free && sigaction(which, &ours, NULL)) return PyErr_SetFromErrno(PyExc_OSError);
    return PyBool_FromLong(is_free || is_ours);
}

static void count_fork(void) { flight_forks++; }

static PyMethodDef functions[] = {
    {"listen", listen_to, METH_O, "Have a signal ask for a dump, unless the program handles it."},
    {NULL},
};

int add_flight(PyObject *module) {
    str_begin = PyUnicode_InternFromString("begin");
    str_end = PyUnicode_InternFromString("end");
    str_name = PyUnicode_InternFromString("name");
    str_ident = PyUnicode_InternFromString("ident");
    str_warmup = PyUnicode_InternFromString("warmup");
    str_warms_up = PyUnicode_InternFromString("warms_up");
    if (!str_begin || !str_end || !str_name || !str_ident || !str_warmup || !str_warms_up) return -1;
    if (pthread_atfork(NULL, NULL, count_fork)) {
        PyErr_NoMemory();
        return -1;
    }
    flight_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    if (flight_type == NULL || PyModule_AddType(module, flight_type)) return -1;
    return PyModule_AddFunctions(module, functions);
}
