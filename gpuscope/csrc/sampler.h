/*
 * What the files of `StreamSampler` share: the class is in `sampler.c`, its thread in `sampler_thread.c`, what that asks in
 * `asking.c`. There is no twin: without the parts in C nothing is asked (`_cuda/stream_sampler.py`).
 *
 * One mutex is for all that threads share; nobody holds it while it calls the driver or waits for the GIL.
 */
#ifndef GPUSCOPE_SAMPLER_H
#define GPUSCOPE_SAMPLER_H

#include "watch.h"

#include <pthread.h>

enum { MOST_STREAMS = 256 };
static const long long SECOND_NS = 1000000000;

/* The driver's functions. */
typedef struct {
    int (*set_context)(void *context);
    int (*exchange_mode)(int *mode);
    int (*is_capturing)(void *stream, int *status);
    int (*query)(void *stream);
} Calls;

/* What the driver said of one stream. The twin is `ANSWER` of `_cuda/stream_sampler.py`. */
typedef struct {
    long long at_ns;
    unsigned long long stream;
    int device, open;
    unsigned round; /* All of a round were asked at one moment, as far as that can be. */
    int had_work;
} Answer;

/* Answers, those with work, those that found no room, refusals of the driver, rounds during captures, rounds missed
   because the driver answered late, streams for which there was no room. */
enum { ASKED, HAD_WORK, DROPPED, ERRORS, CAPTURES, LATE, UNWATCHED, COUNTS };

typedef struct Sampler {
    int refs; /* Of the object, and of the thread. */
    Calls calls;
    long long mean_ns;
    int is_running, is_stopping;
    atomic_int is_asking;
    unsigned long long random;
    unsigned round;
    Watch *watches[MOST_STREAMS];
    int count;
    Answer *ring;
    size_t capacity, first, held;
    long long counts[COUNTS];
    struct Sampler *next;
} Sampler;

/* What was answered last of one stream, for `stall.c`. The twin is `STREAM` of `_stalls/watch.py`. */
typedef struct {
    unsigned long long watch, stream;
    long long device, open, asked_ns, work_since_ns, free_since_ns, had_work_ns;
} StreamState;

extern pthread_mutex_t sampler_lock;
/* How many captures want that nothing is asked. */
extern atomic_int sampler_holds;

long long sampler_now_ns(void);

/* One round, under the lock but for the questions. Returns how long to wait for the next. */
long long ask_streams(Sampler *sampler);

/* What was answered last of so many streams that are asked; returns how many there are. */
int copy_streams(StreamState *to, int most);

/* Null where there is no memory. */
Sampler *new_sampler(const Calls *calls, long long mean_ns, size_t capacity);
/* Each returns 0, or -1 where the thread could not be started, or has not ended in time. */
int start_sampler(Sampler *sampler);
int stop_sampler(Sampler *sampler, long long limit_ns);
/* Lets go of it; its thread, if there is one, ends by itself. */
void drop_sampler(Sampler *sampler);

/* Has no sampler of the process ask anything until `release_samplers`; waits until none does. */
void hold_samplers(void);
void release_samplers(void);

#endif
