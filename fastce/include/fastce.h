/* Softmax cross-entropy and its gradient for rows of a matrix of logits.
 *
 * The functions are made by Python: fastce.capi.address("fastce_cross_entropy_f32") is the address
 * of one of the type fastce_cross_entropy_f32_t, and so on. They live as long as the process, touch
 * nothing of Python and may be called by any threads at once.
 *
 * logits        class c of row i is at (char *)logits + i * row_stride + c * class_stride
 * rows          may be 0
 * classes       at least 1
 * *_stride      bytes; they may be negative
 * targets       one class in [0, classes) for each row, or ignore_index: the row then has loss 0 and
 *               gradient 0, whatever its logits are
 * label_smoothing   in [0, 1]: the share of each label that is spread evenly over all classes
 * z_loss        factor of logsumexp(row)^2, which is added to the loss
 * losses        one for each row, side by side; in nats
 * grad_output   one factor for each row's gradient, side by side; NULL for 1
 * grad          gradients with strides of their own: logits itself (with its strides), or memory
 *               that does not overlap it
 *
 * Returns 0; or 1 + the first row with a bad target, or FASTCE_BAD_ARGUMENT, with nothing written.
 */
#ifndef FASTCE_H
#define FASTCE_H

#include <stdint.h>

#define FASTCE_BAD_ARGUMENT (-1)

#ifdef __cplusplus
extern "C" {
#endif

typedef int64_t (*fastce_cross_entropy_f32_t)(
    const float *logits, int64_t rows, int64_t classes, int64_t row_stride, int64_t class_stride,
    const int64_t *targets, int64_t ignore_index, double label_smoothing, double z_loss,
    float *losses);

typedef int64_t (*fastce_cross_entropy_f64_t)(
    const double *logits, int64_t rows, int64_t classes, int64_t row_stride, int64_t class_stride,
    const int64_t *targets, int64_t ignore_index, double label_smoothing, double z_loss,
    double *losses);

typedef int64_t (*fastce_cross_entropy_and_grad_f32_t)(
    const float *logits, int64_t rows, int64_t classes, int64_t row_stride, int64_t class_stride,
    const int64_t *targets, int64_t ignore_index, double label_smoothing, double z_loss,
    float *losses, const double *grad_output, float *grad, int64_t grad_row_stride,
    int64_t grad_class_stride);

typedef int64_t (*fastce_cross_entropy_and_grad_f64_t)(
    const double *logits, int64_t rows, int64_t classes, int64_t row_stride, int64_t class_stride,
    const int64_t *targets, int64_t ignore_index, double label_smoothing, double z_loss,
    double *losses, const double *grad_output, double *grad, int64_t grad_row_stride,
    int64_t grad_class_stride);

#ifdef __cplusplus
}
#endif

#endif
