/*
 * The thread of a `StreamSampler`, which asks at random moments: its beginning and end, forks, exits, and captures.
 * `_cuda/stream_sampler.py` owns it.
 *
 * Never takes the GIL and touches no object of Python, so that it may be in the driver whatever the interpreter does. It
 * is detached, and what it needs lives as long as it does: whoever stops it waits for a while and no longer. A fork takes
 * the mutex, so that the child finds everything whole; the child has no such thread.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "sampler.h"

#ifdef __linux__
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>

enum { RELAXED = 2 };
static const long long NAP_NS = 20000, HELD_LIMIT_NS = 1000000000, EXIT_LIMIT_NS = 100000000;

pthread_mutex_t sampler_lock = PTHREAD_MUTEX_INITIALIZER;
atomic_int sampler_holds;
static pthread_cond_t changed;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static Sampler *all;

/* Waits, under the lock, for a change or the moment. */
static void wait_until(long long at_ns) {
    const struct timespec until = {at_ns / SECOND_NS, at_ns % SECOND_NS};
    pthread_cond_timedwait(&changed, &sampler_lock, &until);
}

static void make_condition(void) {
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

static void before_fork(void) { pthread_mutex_lock(&sampler_lock); }
static void after_fork(void) { pthread_mutex_unlock(&sampler_lock); }

static void after_fork_in_child(void) {
    for (Sampler *each = all; each != NULL; each = each->next) {
        each->refs -= each->is_running;
        each->is_running = each->is_stopping = 0;
        each->is_asking = 0;
        each->first = each->held = 0;
    }
    sampler_holds = 0;
    make_condition();
    pthread_mutex_unlock(&sampler_lock);
}

/* At the end of the process, whoever ends it: handlers that were registered before, as the driver's, run after this. */
static void at_exit(void) {
    pthread_mutex_lock(&sampler_lock);
    for (Sampler *each = all; each != NULL; each = each->next) each->is_stopping = 1;
    pthread_cond_broadcast(&changed);
    long long until_ns = sampler_now_ns() + EXIT_LIMIT_NS;
    for (Sampler *each = all; each != NULL && sampler_now_ns() < until_ns;) {
        if (each->is_running) {
            wait_until(until_ns);
            each = all;
        } else {
            each = each->next;
        }
    }
    pthread_mutex_unlock(&sampler_lock);
}

static void set_up(void) {
    make_condition();
    pthread_atfork(before_fork, after_fork, after_fork_in_child);
    atexit(at_exit);
}

/* Under the lock. */
static void let_go(Sampler *self) {
    if (--self->refs) return;
    for (Sampler **place = &all; *place != NULL; place = &(*place)->next)
        if (*place == self) {
            *place = self->next;
            break;
        }
    for (int i = 0; i < self->count; i++) self->watches[i]->owner = NULL;
    free(self->ring);
    free(self);
}

static void *run(void *argument) {
    Sampler *self = argument;
    int mode = RELAXED;
    pthread_setname_np(pthread_self(), "gpuscope-sample");
    prctl(PR_SET_TIMERSLACK, 1000UL);
    int code = self->calls.exchange_mode(&mode);
    pthread_mutex_lock(&sampler_lock);
    /* In any other mode a question would break the captures of other threads. */
    if (code) self->counts[ERRORS]++;
    long long next_ns = sampler_now_ns();
    while (!self->is_stopping && !code) {
        if (sampler_now_ns() < next_ns) wait_until(next_ns);
        else next_ns = ask_streams(self) + sampler_now_ns();
    }
    self->is_running = 0;
    pthread_cond_broadcast(&changed);
    let_go(self);
    pthread_mutex_unlock(&sampler_lock);
    return NULL;
}

/* ---- any thread */

Sampler *new_sampler(const Calls *calls, long long mean_ns, size_t capacity) {
    Sampler *self = calloc(1, sizeof *self);
    Answer *ring = calloc(capacity, sizeof *ring);
    if (self == NULL || ring == NULL) {
        free(self);
        free(ring);
        return NULL;
    }
    pthread_once(&once, set_up);
    *self = (Sampler){.refs = 1, .calls = *calls, .mean_ns = mean_ns, .ring = ring, .capacity = capacity};
    self->random = ((uintptr_t)self ^ (unsigned long long)sampler_now_ns()) | 1;
    pthread_mutex_lock(&sampler_lock);
    self->next = all;
    all = self;
    pthread_mutex_unlock(&sampler_lock);
    return self;
}

int start_sampler(Sampler *self) {
    pthread_t thread;
    pthread_attr_t detached;
    sigset_t every, before;
    int failed = 0;
    pthread_mutex_lock(&sampler_lock);
    self->is_stopping = 0; /* A thread that has not noticed goes on. */
    if (!self->is_running) {
        self->random = (self->random ^ (unsigned long long)sampler_now_ns()) | 1; /* A child's moments are its own. */
        pthread_attr_init(&detached);
        pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
        sigfillset(&every);
        pthread_sigmask(SIG_SETMASK, &every, &before); /* Signals are for the program's threads. */
        failed = pthread_create(&thread, &detached, run, self);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&detached);
        self->is_running = !failed;
        self->refs += !failed;
    }
    pthread_mutex_unlock(&sampler_lock);
    return failed ? -1 : 0;
}

int stop_sampler(Sampler *self, long long limit_ns) {
    pthread_mutex_lock(&sampler_lock);
    self->is_stopping = 1;
    pthread_cond_broadcast(&changed);
    long long until_ns = sampler_now_ns() + limit_ns;
    while (self->is_running && self->is_stopping && sampler_now_ns() < until_ns) wait_until(until_ns);
    int failed = self->is_running;
    pthread_mutex_unlock(&sampler_lock);
    return failed ? -1 : 0;
}

void drop_sampler(Sampler *self) {
    pthread_mutex_lock(&sampler_lock);
    self->is_stopping = 1;
    pthread_cond_broadcast(&changed);
    let_go(self);
    pthread_mutex_unlock(&sampler_lock);
}

int copy_streams(StreamState *to, int most) {
    int count = 0;
    pthread_mutex_lock(&sampler_lock);
    for (Sampler *each = all; each != NULL; each = each->next)
        for (int i = 0; each->is_running && i < each->count && count < most; i++) {
            const Watch *watch = each->watches[i];
            to[count++] = (StreamState){
                (uintptr_t)watch, (uintptr_t)watch->stream, watch->device, atomic_load(&watch->open), watch->asked_ns,
                watch->work_since_ns, watch->free_since_ns, watch->had_work_ns,
            };
        }
    pthread_mutex_unlock(&sampler_lock);
    return count;
}

static int is_any_asking(void) {
    for (Sampler *each = all; each != NULL; each = each->next)
        if (atomic_load(&each->is_asking)) return 1;
    return 0;
}

void hold_samplers(void) {
    const struct timespec moment = {0, NAP_NS};
    long long until_ns = sampler_now_ns() + HELD_LIMIT_NS;
    atomic_fetch_add(&sampler_holds, 1);
    pthread_mutex_lock(&sampler_lock);
    while (is_any_asking() && sampler_now_ns() < until_ns) {
        pthread_mutex_unlock(&sampler_lock);
        nanosleep(&moment, NULL);
        pthread_mutex_lock(&sampler_lock);
    }
    pthread_mutex_unlock(&sampler_lock);
}

void release_samplers(void) {
    /* A child has none of its parent's. */
    int holds = atomic_load(&sampler_holds);
    while (holds > 0 && !atomic_compare_exchange_weak(&sampler_holds, &holds, holds - 1)) continue;
}
#endif
