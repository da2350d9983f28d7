/* What the library shows: everything else is hidden (-fvisibility=hidden). */
#ifndef FINEBITS_EXPORT_H
#define FINEBITS_EXPORT_H

#define EXPORT __attribute__((visibility("default")))

#endif
