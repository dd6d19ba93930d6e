/* What the files of this consumer share. */
#ifndef EXPECT_H_
#define EXPECT_H_

#include <stdio.h>

#define EXPECT(condition)                                                       \
  do {                                                                          \
    if (!(condition)) {                                                         \
      fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      return 1;                                                                 \
    }                                                                           \
  } while (0)

static inline int near(double a, double b) { return a - b < 1e-5 && b - a < 1e-5; }

int losses(void); /* losses.c: rows of logits and advantages; 0 when all is right */

#endif /* EXPECT_H_ */
