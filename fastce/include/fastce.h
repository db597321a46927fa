/* Softmax cross-entropy and its gradient for rows of a matrix of logits.
 *
 * The functions are made by Python: fastce.capi.address("float32") is the address of one of the
 * type fastce_cross_entropy_f32, and so on. They live as long as the process, touch nothing of
 * Python and may be called by any threads at once.
 *
 * A function returns 0; or 1 + the first row with a bad target, or FASTCE_BAD_ARGUMENT, with nothing
 * written. It takes a structure that fastce_new_call_f32() has made, all zero but for its size and
 * ignore_index = FASTCE_IGNORE_INDEX, in which the caller fills in:
 *
 * logits        class c of row i is at (char *)logits + i * row_stride + c * class_stride
 * rows          may be 0
 * classes       at least 1
 * *_stride      bytes; they may be negative
 * targets       one class in [0, classes) for each row, or ignore_index: the row then has loss 0 and
 *               gradient 0, whatever its logits are
 * losses        one for each row, side by side; in nats
 *
 * and may fill in:
 *
 * label_smoothing   in [0, 1]: the share of each label that is spread evenly over all classes
 * z_loss        factor of logsumexp(row)^2, which is added to the loss
 *
 * Each of these goes with a function that was made for it, address("float32", grad=True) say, and
 * then must be filled in:
 *
 * grad          (grad=True) gradients with strides of their own: logits itself (with its strides),
 *               or memory that does not overlap what is read
 * grad_output   one factor for each row's gradient, side by side; may stay 0, which means 1
 * probabilities (soft=True) targets with strides of their own, in the place of `targets`
 * weight        (weight=True) one finite factor for each class, side by side
 * softcap       (softcap=True) positive: logits z count as softcap * tanh(z / softcap)
 */
#ifndef FASTCE_H
#define FASTCE_H

#include <stdint.h>
#include <string.h>

#define FASTCE_BAD_ARGUMENT (-1)
#define FASTCE_IGNORE_INDEX (-100)

#define FASTCE_CALL(number)           \
    {                                 \
        int64_t size;                 \
        int64_t ignore_index;         \
        const number *logits;         \
        int64_t rows;                 \
        int64_t classes;              \
        int64_t row_stride;           \
        int64_t class_stride;         \
        const int64_t *targets;       \
        const number *probabilities;  \
        int64_t probability_row_stride;   \
        int64_t probability_class_stride; \
        const number *weight;         \
        double label_smoothing;       \
        double z_loss;                \
        double softcap;               \
        number *losses;               \
        const double *grad_output;    \
        number *grad;                 \
        int64_t grad_row_stride;      \
        int64_t grad_class_stride;    \
    }

#ifdef __cplusplus
extern "C" {
#endif

typedef struct FASTCE_CALL(float) fastce_call_f32;
typedef struct FASTCE_CALL(double) fastce_call_f64;

typedef int64_t (*fastce_cross_entropy_f32)(const fastce_call_f32 *call);
typedef int64_t (*fastce_cross_entropy_f64)(const fastce_call_f64 *call);

static inline fastce_call_f32 fastce_new_call_f32(void) {
    fastce_call_f32 call;
    memset(&call, 0, sizeof call);
    call.size = (int64_t)sizeof call;
    call.ignore_index = FASTCE_IGNORE_INDEX;
    return call;
}

static inline fastce_call_f64 fastce_new_call_f64(void) {
    fastce_call_f64 call;
    memset(&call, 0, sizeof call);
    call.size = (int64_t)sizeof call;
    call.ignore_index = FASTCE_IGNORE_INDEX;
    return call;
}

#ifdef __cplusplus
}
#endif

#undef FASTCE_CALL

#endif
