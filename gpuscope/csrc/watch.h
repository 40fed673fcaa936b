/*
 * How many stages are open on a stream, for a `StreamSampler` (`sampler.c`): there is no twin, and without the parts in C
 * nothing is asked (`_cuda/stream_sampler.py`). The hot path writes two numbers of a `Watch`, and waits for nobody.
 */
#ifndef GPUSCOPE_WATCH_H
#define GPUSCOPE_WATCH_H

#include "native.h"

#include <stdatomic.h>

/* A stream that may be asked about. Its memory is used again and never freed, because a record may still refer to it. */
struct Watch {
    struct Sampler *owner; /* Null once nobody asks any more. */
    struct Watch *next; /* Of those that are free. */
    void *context, *stream;
    int device;
    /* Written under the GIL, read by the thread. */
    atomic_int open;
    atomic_llong used_ns;
    /* Of the thread: when it last had work, and whether the driver refused to tell. */
    long long had_work_ns;
    int is_refused;
    /* When it was asked last, and since when all answers are alike; 0 for never. */
    long long asked_ns, work_since_ns, free_since_ns;
};

/* Of `stall.h`: the stream of each stage in the flight recorder's ring that is watched, by its slot; else null. */
typedef _Atomic(Watch *) WatchOfSlot;
extern WatchOfSlot *stall_streams;
extern size_t stall_slots;

/* A stage is open on a stream. Called under the GIL. */
static inline void count_open(StageRecord *record, const TimedStream *timed_stream) {
    Watch *watch = timed_stream->watch;
    if (watch == NULL || record->watch != NULL) return;
    record->watch = watch;
    if (stall_streams != NULL && record->flight - 1 < stall_slots)
        atomic_store_explicit(&stall_streams[record->flight - 1], watch, memory_order_relaxed);
    atomic_store_explicit(&watch->open, atomic_load_explicit(&watch->open, memory_order_relaxed) + 1, memory_order_relaxed);
    atomic_store_explicit(&watch->used_ns, record->called_ns, memory_order_relaxed);
}

static inline void count_left(StageRecord *record) {
    Watch *watch = record->watch;
    if (watch == NULL) return;
    record->watch = NULL;
    int open = atomic_load_explicit(&watch->open, memory_order_relaxed);
    if (open > 0) atomic_store_explicit(&watch->open, open - 1, memory_order_relaxed);
    if (record->called_ns > atomic_load_explicit(&watch->used_ns, memory_order_relaxed))
        atomic_store_explicit(&watch->used_ns, record->called_ns, memory_order_relaxed);
}

#endif
