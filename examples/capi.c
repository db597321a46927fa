/* Rows divided among threads that Python knows nothing of; see capi.py. */
#include <pthread.h>
#include <stdint.h>

#include "fastce.h"

enum { THREADS = 4 };

typedef struct {
    fastce_cross_entropy_f32 function;
    fastce_call_f32 call;
    int64_t status;
} part;

static void *run(void *argument) {
    part *p = argument;
    p->status = p->function(&p->call);
    return 0;
}

/* Losses of all rows, weighted by class; gradients in the place of the logits. 0 or 1 + the first
 * row with a bad target. */
int64_t losses_and_grads(fastce_cross_entropy_f32 function, float *logits, int64_t rows,
                         int64_t classes, const int64_t *targets, const float *weight,
                         float *losses) {
    pthread_t threads[THREADS];
    part parts[THREADS];
    int64_t first[THREADS], status = 0;
    for (int k = 0; k < THREADS; ++k) {
        fastce_call_f32 call = fastce_new_call_f32();
        first[k] = rows * k / THREADS;
        call.grad = logits + first[k] * classes;
        call.logits = call.grad;
        call.rows = rows * (k + 1) / THREADS - first[k];
        call.classes = classes;
        call.row_stride = call.grad_row_stride = classes * (int64_t)sizeof(float);
        call.class_stride = call.grad_class_stride = sizeof(float);
        call.targets = targets + first[k];
        call.weight = weight;
        call.label_smoothing = 0.1;
        call.losses = losses + first[k];
        parts[k] = (part){function, call, 0};
        pthread_create(&threads[k], 0, run, &parts[k]);
    }
    for (int k = 0; k < THREADS; ++k) {
        pthread_join(threads[k], 0);
        if (status == 0 && parts[k].status != 0)
            status = first[k] + parts[k].status;
    }
    return status;
}
