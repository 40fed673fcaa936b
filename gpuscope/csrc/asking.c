/*
 * What the thread of a `StreamSampler` asks, in one round: has this stream work? `_cuda/stream_sampler.py` owns it.
 *
 * A question about a stream that is being captured would break the capture. The thread asks for that first, and between
 * the two questions a capture may begin. PyTorch's captures therefore hold all samplers from before they begin until they
 * have ended (`_cuda/graphs/quiet.py`); the first question is for those of others.
 */
#include "sampler.h"

#ifdef __linux__
#include <time.h>

enum { FEW_STREAMS = 8, SUCCESS = 0, NOT_READY = 600, FIRST_OF_CAPTURE = 900, LAST_OF_CAPTURE = 907 };
static const long long RECENT_NS = 2000000000, BUSY_NS = 60000000000;
static const long long IDLE_NS = 10000000; /* Between two looks while no stream is in use. */

long long sampler_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * SECOND_NS + now.tv_nsec;
}

static unsigned long long draw(Sampler *self) {
    self->random ^= self->random << 13;
    self->random ^= self->random >> 7;
    return self->random ^= self->random << 17;
}

static int is_in_use(const Watch *watch, long long at_ns) {
    if (watch->is_refused) return 0;
    if (atomic_load_explicit(&watch->open, memory_order_relaxed) > 0) return 1;
    long long unused_ns = at_ns - atomic_load_explicit(&watch->used_ns, memory_order_relaxed);
    /* Work may go on for long after its stage was left. */
    return unused_ns < RECENT_NS || (unused_ns < BUSY_NS && at_ns - watch->had_work_ns < RECENT_NS);
}

typedef struct {
    Watch *watch;
    void *context, *stream;
    Answer answer;
    int code;
} Question;

/* Under the lock. */
static int choose(const Sampler *self, Question *asked) {
    int count = 0;
    long long at_ns = sampler_now_ns();
    for (int i = 0; i < self->count; i++) {
        Watch *watch = self->watches[i];
        if (!is_in_use(watch, at_ns)) continue;
        asked[count++] = (Question){.watch = watch, .context = watch->context, .stream = watch->stream,
                                    .answer.stream = (uintptr_t)watch->stream, .answer.device = watch->device};
    }
    return count;
}

static int is_of_capture(int code) { return code >= FIRST_OF_CAPTURE && code <= LAST_OF_CAPTURE; }

/* Makes the stream's context current, in which the default stream is that of this context. */
static int enter(const Sampler *self, const Question *one, void **context) {
    if (*context == one->context) return SUCCESS;
    *context = one->context;
    return self->calls.set_context(one->context);
}

/* Whether none of the streams is being captured, as far as can be told. */
static int are_free(const Sampler *self, Question *asked, int count) {
    void *context = NULL;
    for (int i = 0; i < count; i++) {
        int status = 0, code = enter(self, &asked[i], &context);
        if (code == SUCCESS) code = self->calls.is_capturing(asked[i].stream, &status);
        if (status || is_of_capture(code)) return 0;
        asked[i].code = code; /* Of such a stream no more is asked. */
    }
    return 1;
}

/* Returns 0 where a capture came between. */
static int ask_all(const Sampler *self, Question *asked, int count) {
    void *context = NULL;
    for (int i = 0; i < count; i++) {
        Question *one = &asked[i];
        if (one->code || (one->code = enter(self, one, &context))) continue;
        one->code = self->calls.query(one->stream);
        if (is_of_capture(one->code)) return 0;
        /* Where the driver's lock was held, the answer is of its end. */
        one->answer.at_ns = sampler_now_ns();
        one->answer.had_work = one->code == NOT_READY;
        one->answer.open = atomic_load_explicit(&one->watch->open, memory_order_relaxed);
    }
    return 1;
}

/* Notes since when all answers are alike. Under the lock. */
static void note(Watch *watch, const Answer *answer) {
    if (answer->at_ns - watch->asked_ns > RECENT_NS / 2) watch->work_since_ns = watch->free_since_ns = 0;
    watch->asked_ns = answer->at_ns;
    long long *since_ns = answer->had_work ? &watch->work_since_ns : &watch->free_since_ns;
    if (!*since_ns) *since_ns = answer->at_ns;
    *(answer->had_work ? &watch->free_since_ns : &watch->work_since_ns) = 0;
    if (answer->had_work) watch->had_work_ns = answer->at_ns;
}

/* Under the lock. */
static void keep(Sampler *self, const Question *one) {
    if (one->watch->owner != self || one->watch->stream != one->stream) return; /* Asked about no more. */
    if (one->code != SUCCESS && one->code != NOT_READY) {
        self->counts[ERRORS]++;
        one->watch->is_refused = 1;
        return;
    }
    note(one->watch, &one->answer);
    self->counts[ASKED]++;
    self->counts[HAD_WORK] += one->answer.had_work;
    if (self->held == self->capacity) {
        self->first = (self->first + 1) % self->capacity;
        self->held--;
        self->counts[DROPPED]++;
    }
    Answer *place = &self->ring[(self->first + self->held++) % self->capacity];
    *place = one->answer;
    place->round = self->round;
}

long long ask_streams(Sampler *self) {
    Question asked[MOST_STREAMS];
    int count = choose(self, asked);
    /* Where there are many streams they are asked less often, so that the driver is not. */
    long long mean_ns = self->mean_ns * ((count + FEW_STREAMS - 1) / FEW_STREAMS);
    if (count == 0) return self->mean_ns > IDLE_NS ? self->mean_ns : IDLE_NS;
    pthread_mutex_unlock(&sampler_lock);
    long long began_ns = sampler_now_ns();
    atomic_store(&self->is_asking, 1);
    int are_answers = atomic_load(&sampler_holds) == 0 && are_free(self, asked, count) && ask_all(self, asked, count);
    atomic_store(&self->is_asking, 0);
    long long took_ns = sampler_now_ns() - began_ns;
    pthread_mutex_lock(&sampler_lock);
    self->round++;
    self->counts[CAPTURES] += !are_answers;
    self->counts[LATE] += took_ns / mean_ns;
    for (int i = 0; are_answers && i < count; i++) keep(self, &asked[i]);
    return mean_ns / 2 + (long long)(draw(self) % (unsigned long long)mean_ns);
}
#endif
