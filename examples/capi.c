/* Rows divided among threads that Python knows nothing of; see capi.py. */
#include <pthread.h>
#include <stdint.h>

#include "fastce.h"

enum { THREADS = 4 };

typedef struct {
    fastce_cross_entropy_and_grad_f32_t function;
    float *logits; /* overwritten by the gradient */
    int64_t first, last, classes;
    const int64_t *targets;
    float *losses;
    int64_t status;
} part;

static void *run(void *argument) {
    part *p = argument;
    int64_t stride = p->classes * (int64_t)sizeof(float);
    float *logits = p->logits + p->first * p->classes;
    p->status = p->function(logits, p->last - p->first, p->classes, stride, sizeof(float),
                            p->targets + p->first, -100, 0.0, 0.0, p->losses + p->first, 0, logits,
                            stride, sizeof(float));
    return 0;
}

/* Losses of all rows, gradients in place; 0 or 1 + the first row with a bad target. */
int64_t losses_and_grads(fastce_cross_entropy_and_grad_f32_t function, float *logits, int64_t rows,
                         int64_t classes, const int64_t *targets, float *losses) {
    pthread_t threads[THREADS];
    part parts[THREADS];
    int64_t status = 0;
    for (int k = 0; k < THREADS; ++k) {
        parts[k] = (part){function, logits, rows * k / THREADS, rows * (k + 1) / THREADS, classes,
                          targets, losses, 0};
        pthread_create(&threads[k], 0, run, &parts[k]);
    }
    for (int k = 0; k < THREADS; ++k) {
        pthread_join(threads[k], 0);
        if (status == 0 && parts[k].status != 0)
            status = parts[k].first + parts[k].status;
    }
    return status;
}
