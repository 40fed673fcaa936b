/*
 * Trace and span ids, from a generator that is seeded by the recorder's own. The twin is `begin_in_python` of
 * `_recording/hot_path.py`, which draws from the recorder's own each time.
 */
#include "native.h"

static int draw(Recorder *recorder, unsigned long long *number) {
    PyObject *random_bits = Py_XNewRef(recorder->random_bits);
    if (random_bits == NULL) PyErr_SetString(PyExc_AttributeError, "random_bits");
    PyObject *bits = random_bits == NULL ? NULL : PyObject_CallFunction(random_bits, "i", 64);
    if (bits != NULL) *number = PyLong_AsUnsignedLongLong(bits);
    Py_XDECREF(random_bits);
    Py_XDECREF(bits);
    return PyErr_Occurred() ? -1 : 0;
}

static int is_seeded(const Recorder *recorder) {
    return recorder->random[0] || recorder->random[1] || recorder->random[2] || recorder->random[3];
}

static int seed(Recorder *recorder) {
    unsigned long long state[4];
    for (int i = 0; i < 4; i++)
        if (draw(recorder, &state[i])) return -1;
    memcpy(recorder->random, state, sizeof state);
    return 0;
}

static inline unsigned long long rotate(unsigned long long x, int bits) { return x << bits | x >> (64 - bits); }

/* xoshiro256++: Blackman and Vigna, "Scrambled linear pseudorandom number generators", ACM TOMS 47 (2021). */
static unsigned long long next_random(unsigned long long *s) {
    unsigned long long result = rotate(s[0] + s[3], 23) + s[0], shifted = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= shifted;
    s[3] = rotate(s[3], 45);
    return result;
}

int new_trace(Recorder *recorder, StageRecord *record) {
    if (!is_seeded(recorder) && seed(recorder)) return -1;
    Trace *trace = (Trace *)trace_type->tp_alloc(trace_type, 0);
    if (trace == NULL) return -1;
    trace->root = Py_NewRef(record->site);
    trace->high = next_random(recorder->random);
    trace->low = next_random(recorder->random);
    put(&record->trace, (PyObject *)trace);
    return 0;
}

int next_span_id(Recorder *recorder, StageRecord *record) {
    if (recorder->last_span_id == 0) {
        PyObject *ids = Py_XNewRef(recorder->span_ids);
        PyObject *id = ids == NULL || !PyIter_Check(ids) ? NULL : PyIter_Next(ids);
        unsigned long long first = id == NULL ? 0 : PyLong_AsUnsignedLongLong(id);
        Py_XDECREF(ids);
        Py_XDECREF(id);
        if (id == NULL && !PyErr_Occurred()) PyErr_SetString(PyExc_AttributeError, "span_ids");
        if (PyErr_Occurred()) return -1;
        if (recorder->last_span_id == 0) recorder->last_span_id = first - 1;
    }
    record->span_id = ++recorder->last_span_id;
    return 0;
}
