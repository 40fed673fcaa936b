/*
 * The flight recorder's ring, for `recording.c`, which writes to it on the hot path. The layout is that of
 * `_data/flight.py`, and the twin is `_flight/ring.py`. All is called under the GIL, so that a slot has one writer.
 */
#ifndef GPUSCOPE_FLIGHT_H
#define GPUSCOPE_FLIGHT_H

#include "watch.h"

typedef unsigned long long Number;

enum { MAX_SITES = 4096, MAX_THREADS = 512, SITE_BUCKETS = 8192, THREAD_BUCKETS = 1024, MOST_SKIPPED = 16 };
enum { STAGE_KIND = 1, MARK_KIND = 3, KIND_MASK = 15 };
enum { END = 5, FLAGS_SHIFT = 4, SITE_SHIFT = 12, CHECK_SHIFT = 24, LAP_SHIFT = 40 };
enum { FLAG_REMOTE = 2 };
enum { WANT_SLOW = 1, WANT_FAILED = 2, WANT_SIGNAL = 8 };

/* A record: its word is written last. */
typedef struct {
    _Atomic Number field[7];
    _Atomic Number word;
} Slot;

/* What is known of an object by its address; it is held, so that no other one has that. */
typedef struct {
    PyObject *object;
    Number value;
} Known;

/* The ring is two: what the collector writes, perhaps late and much at once, takes no place of what stages write. */
enum { OF_STAGES, OF_COLLECTOR };

typedef struct {
    size_t cursor;
    Number lap;
} Part;

typedef struct {
    PyObject_HEAD
    Py_buffer view;
    char *base; /* Null once it is closed. */
    Slot *slots;
    size_t count; /* Of each part. */
    Part parts[2];
    long long slow_ns; /* 0: no request is slow. */
    struct StallWatch *stall; /* Of `stall.h`: reads the ring without the GIL, under a lock. */
    unsigned wanted, site_count, thread_count, forks;
    int warmups[MAX_SITES]; /* Of each stage's name: its own number of first calls that are warm-up; -1 for none. */
    Known *sites, *threads, last_thread;
} FlightRing;

extern PyTypeObject *flight_type;
/* How often this process is the child of a fork: the ring is the parent's then. */
extern unsigned flight_forks;

/* Has a watch read the ring no more, before that goes. */
void leave_ring(FlightRing *ring);

void flight_write_begin(FlightRing *ring, StageRecord *record);
void flight_write_end(FlightRing *ring, StageRecord *record, PyObject *error);

/* What stands in a ring's place, or around it, is called in Python: -1 and an exception on failure. */
int flight_call(PyObject *flight, StageRecord *record);
int flight_call_end(PyObject *flight, StageRecord *record, PyObject *error);

static inline FlightRing *as_ring(PyObject *flight) {
    if (!Py_IS_TYPE(flight, flight_type)) return NULL;
    FlightRing *ring = (FlightRing *)flight;
    return ring->base != NULL && ring->forks == flight_forks ? ring : NULL;
}

/* Notes that a stage has begun, in a ring if there is one. */
static inline int note_begin(Recorder *recorder, StageRecord *record) {
    PyObject *flight = recorder->flight;
    if (!is_present(flight)) return 0;
    FlightRing *ring = as_ring(flight);
    if (ring != NULL) flight_write_begin(ring, record);
    return ring != NULL || Py_IS_TYPE(flight, flight_type) ? 0 : flight_call(flight, record);
}

static inline int note_end(Recorder *recorder, StageRecord *record, PyObject *error) {
    PyObject *flight = recorder->flight;
    if (!is_present(flight)) return 0;
    FlightRing *ring = as_ring(flight);
    if (ring != NULL && record->flight) flight_write_end(ring, record, error);
    return ring != NULL || Py_IS_TYPE(flight, flight_type) ? 0 : flight_call_end(flight, record, error);
}

#endif
